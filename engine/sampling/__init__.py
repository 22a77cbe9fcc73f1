"""Turns logits into tokens.

`sampler.py` is called once per step. `logits_processors.py` changes logits before sampling: min_tokens
suppresses the end of sequence, and penalties, bias, bad words and grammars apply. `logprobs.py` computes
log-probabilities. The arithmetic of sampling itself (temperature, top-k, top-p, min-p, seeded noise) is in
`engine/kernels/sample.py`, next to its C++ and Triton versions.
"""
