"""Kernels for GPUs in Triton. `kernels.py` implements `engine.kernels.interface.Kernels` with them.

Tests compare each kernel with `engine.kernels.reference` or with a few lines of torch: in Triton's
interpreter on a CPU, and compiled on a GPU.
"""
