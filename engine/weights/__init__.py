"""Model directories: configuration, tensors, which slices each rank holds, and loading them.

A new model architecture goes into `architectures.py`.
"""
