"""An engine whose device fails when it computes certain tokens: `python -m tests.gpu.faulty_engine --fd N`.

On a GPU the failures are real. Elsewhere this raises the errors that torch would raise.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from engine.execution.decoder import Decoder
from engine.execution.step_input import StepTensors
from engine.processes import rank as process

IN_A_KERNEL, NO_MEMORY, LOST = 201, 202, 203
_ERRORS = {
    IN_A_KERNEL: RuntimeError("CUDA error: an illegal memory access was encountered"),
    NO_MEMORY: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 PiB."),
    LOST: RuntimeError("CUDA error: context is destroyed"),
}


class Faulty(Decoder):
    """Makes its device fail when a step has one of the tokens above."""

    def forward(self, step: StepTensors, x_TD: torch.Tensor | None = None) -> torch.Tensor:
        """See Decoder."""
        if step.token_ids_T.is_cuda and torch.cuda.is_current_stream_capturing():
            return super().forward(step, x_TD)  # a capture must not read tokens on the host
        for token in set(step.token_ids_T.tolist()) & _ERRORS.keys():
            _fail(token, step.token_ids_T.device)
        return super().forward(step, x_TD)


def _fail(what: int, device: torch.device) -> None:
    if device.type != "cuda":
        raise _ERRORS[what]
    if what == IN_A_KERNEL:
        torch.zeros(1, device=device)[torch.tensor([1 << 30], device=device)].item()
    elif what == NO_MEMORY:
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    else:
        maps = Path("/proc/self/maps").read_text().splitlines()
        # The library that torch has loaded.
        runtime = next(line.split()[-1] for line in maps if "libcudart" in line)
        ctypes.CDLL(runtime).cudaDeviceReset()
        torch.zeros(1, device=device).item()


if __name__ == "__main__":
    from engine.execution import runner

    runner.Decoder = Faulty  # type: ignore[misc]
    process.main()
