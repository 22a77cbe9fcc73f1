"""Executes plans on one rank.

`runner.py` runs the forward pass and the sampling. `step_input.py` turns a plan into tensors. `decoder.py` is
the model, `rope.py` its rotary position embedding. `cuda_graphs.py` captures decode steps and replays them.
"""
