"""What the decoder computes: one interface (`interface.py`), one implementation per kind of device.

- `native.py` and the C++ sources here: x86-64 CPUs.
- `gpu/`: GPUs, in Triton.
- `reference.py`: plain torch, for every other device, and what the others are checked against.

`choose.py` picks one of them.
"""
