"""How the ranks of a replica talk: plans, tensors, shared memory."""
