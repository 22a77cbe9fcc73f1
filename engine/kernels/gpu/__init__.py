"""Kernels for GPUs in Triton, one file for each idea; `kernels.py` puts them behind `engine.kernels.Kernels`.

Each has a torch function with the same arguments in `engine.kernels.reference`, or one in its test, with
which it agrees: in Triton's interpreter on a CPU, and for real on a GPU.
"""
