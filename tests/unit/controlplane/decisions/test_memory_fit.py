from __future__ import annotations

import pytest

from controlplane.decisions.memory_fit import RANK_BYTES, fits
from phalanx.store.records import DeploymentRecord, LayoutRecord, WorkerRecord

GIB = 1 << 30


def worker(name: str, memory: int, device: str = "cpu", host: str = "h") -> WorkerRecord:
    return WorkerRecord(name, "boot", host, f"{name}:1", device, 1, memory_bytes=memory)


def deployment(**fields: str) -> DeploymentRecord:
    return DeploymentRecord("a", 1, "/m", **fields)  # type: ignore[arg-type]


LAYOUT = LayoutRecord(2, 1, GIB)


@pytest.mark.parametrize(
    ("fields", "each"),
    [
        ({}, 4 * GIB),
        ({"dtype": "bfloat16"}, 2 * GIB),
        ({"quantization": "int8"}, int(1.1 * GIB)),
        ({"quantization": "int4"}, int(0.65 * GIB)),
    ],
)
def test_workers_of_a_host_share_its_memory(fields: dict[str, str], each: int) -> None:
    enough = int(2 * (each + RANK_BYTES) / 0.9) + 2
    pair = [worker("w0", enough), worker("w1", enough)]
    assert fits(deployment(**fields), LAYOUT, pair)
    assert not fits(deployment(**fields), LAYOUT, [worker("w0", enough - 8), worker("w1", enough - 8)])
    apart = [worker("w0", enough // 2, host="h0"), worker("w1", enough // 2, host="h1")]
    assert fits(deployment(**fields), LAYOUT, apart)


def test_a_gpu_has_memory_of_its_own() -> None:
    enough = int((2 * GIB + RANK_BYTES) / 0.9) + 1
    assert fits(deployment(), LAYOUT, [worker("w0", enough, "cuda:0"), worker("w1", enough, "cuda:1")])
    assert not fits(deployment(), LAYOUT, [worker("w0", enough, "cuda:0"), worker("w1", GIB, "cuda:1")])


def test_what_is_not_known_is_believed_to_fit() -> None:
    assert fits(deployment(), LAYOUT, [worker("w0", 0), worker("w1", 0)])
    assert fits(deployment(), LayoutRecord(2, 1), [worker("w0", 4 * GIB), worker("w1", 4 * GIB)])
