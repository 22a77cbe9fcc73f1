"""Whether a layout fits into the memory of the workers that would run it. Pure.

Only what is known counts: a model that the controller could not read, or a device whose memory a worker does
not say, is given the benefit of the doubt. An engine that does not fit after all says so when it starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from engine.config import EngineConfig
from phalanx.store.records import DeploymentRecord, LayoutRecord, WorkerRecord

RANK_BYTES = 3 << 29  # beside its weights: runtime, activations, and the 1 GiB of KV cache of a CPU's rank
USABLE = 0.9  # of a device's memory
_DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}
_QUANTIZED_BYTES = {"int8": 1.1, "fp8": 1.1, "int4": 0.65}  # with scales, and what is never quantized


def fits(deployment: DeploymentRecord, layout: LayoutRecord, workers: Sequence[WorkerRecord]) -> bool:
    """Whether these workers, one per rank, have the memory. CPU workers of a host share that of the host.

    What other replicas take there is not known here, nor how long a sequence the KV cache must hold.
    """
    needed: Counter[tuple[str, str]] = Counter()
    known = {}
    for worker in workers:
        device = (worker.host, worker.device)
        needed[device] += int(layout.weights * _weight_bytes(deployment, worker.device)) + RANK_BYTES
        known[device] = worker.memory_bytes
    return all(not known[device] or needed[device] <= USABLE * known[device] for device in needed)


def _weight_bytes(deployment: DeploymentRecord, device: str) -> float:
    """Bytes that one number takes."""
    if deployment.quantization:
        return _QUANTIZED_BYTES.get(deployment.quantization, 4.0)
    return _DTYPE_BYTES.get(EngineConfig("", device=device, dtype=deployment.dtype).dtype_name, 4.0)
