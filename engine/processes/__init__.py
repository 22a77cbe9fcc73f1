"""One rank as a process: `startup.py` starts it, `core.py` runs steps and lists what a step does, in order.

`rank.py` is the entry point, `serve.py` the leader's loop, `forkserver.py` forks ranks quickly.
"""
