"""Decides whether a layout fits into the memory of the workers that would run it. Pure.

An unknown size counts as fitting. The controller may be unable to read the model, and a worker may not report
the memory of its device. An engine that does not fit after all fails when it starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from engine.config import EngineConfig
from phalanx.store.records import DeploymentRecord, LayoutRecord, WorkerRecord

RANK_BYTES = 3 << 29  # per rank beside the weights: runtime, activations, and a CPU's KV cache of 1 GiB
USABLE = 0.9  # fraction of a device's memory
_DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
# Includes scales, and the tensors that stay unquantised.
_QUANTIZED_BYTES = {"int8": 1.1, "fp8": 1.1, "int4": 0.65}


def fits(deployment: DeploymentRecord, layout: LayoutRecord, workers: Sequence[WorkerRecord]) -> bool:
    """Whether these workers, one per rank, have enough memory. The CPU workers of a host share its memory.

    Ignores other replicas on the same devices, and how long a sequence the KV cache must hold.
    """
    needed: Counter[tuple[str, str]] = Counter()
    known = {}
    for worker in workers:
        device = (worker.host, worker.device)
        needed[device] += int(layout.weights * _weight_bytes(deployment, worker.device)) + RANK_BYTES
        known[device] = worker.memory_bytes
    return all(not known[device] or needed[device] <= USABLE * known[device] for device in needed)


def _weight_bytes(deployment: DeploymentRecord, device: str) -> float:
    """Bytes per weight element."""
    if deployment.quantization:
        return _QUANTIZED_BYTES.get(deployment.quantization, 4.0)
    return _DTYPE_BYTES.get(EngineConfig("", device=device, dtype=deployment.dtype).dtype_name, 4.0)
