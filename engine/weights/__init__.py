"""Model directories: configuration, tensors, what each rank holds of them, and loading it."""
