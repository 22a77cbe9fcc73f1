"""How ranks exchange step plans (over TCP) and tensors (over NCCL, shared memory or gloo)."""
