"""Executes step plans: a plan becomes tensors, the decoder runs them, a CUDA graph repeats them."""
