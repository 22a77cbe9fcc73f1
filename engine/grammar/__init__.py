"""Structured outputs: which grammars are accepted, how they are compiled, and the masks that enforce them.

`service.py` is what the engine calls. It compiles in a thread through `compiler.py`, which talks to
`compiler_process.py` by `compiler_protocol.py`. `matcher.py` is what the scheduler sees.
"""
