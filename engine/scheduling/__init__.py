"""Decides each step: which sequences run, how many tokens they compute, in which KV blocks. No torch.

One step, in the order in which it is decided:

- `scheduler`: the queues, and the plan of each step. It cuts prompts into chunks.
- `sequence`, `choices`: one choice of a request, and the choices that share a prompt.
- `priority`: the order in which sequences are served.
- `demand`, `budget`: how much there is to compute, and how many tokens of it the step takes.
- `preemption`: which sequences lose their blocks to others.
- `prefix_match`, `prefix_hash`: which tokens of a sequence are already computed, in cached blocks.
- `block_tables`, `blocks`, `sliding_window`: the blocks of each sequence, the pool, and the blocks that an
  attention window no longer sees.
- `plan_draft`: the plan while the scheduler makes it.
- `limits`, `validation`: the sizes that the scheduler works with, and which requests the engine refuses.
- `integrity`: checks that the scheduler's state is consistent.
"""
