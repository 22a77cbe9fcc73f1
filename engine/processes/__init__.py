"""One rank as a process.

- `rank.py`: the entry point of every rank. `forkserver.py` forks ranks, which is faster than starting Python.
- `startup.py`: the steps of a start. `config_check.py`, `kv_sizing.py`, `replica_group.py` and `warm_up.py`
  are parts of it.
- `core.py`: rank 0's part of every step, and the list of all that a step does, in order.
- `serve.py`: the loop of rank 0 between its worker and its core.
"""
