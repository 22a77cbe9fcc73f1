"""Executes plans on one rank.

`step_input.py` turns a plan into tensors. `runner.py` runs forward and sampling. `decoder.py` is the model.
`cuda_graphs.py` replays decode steps that were captured before.
"""
