from __future__ import annotations

import pytest
import torch

from engine.errors import EngineError, ModelError, as_engine_error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "OUT_OF_MEMORY"),
        (torch.AcceleratorError("an illegal memory access was encountered\nmore"), "DEVICE_FAILED"),
        (RuntimeError("CUDA error: device-side assert triggered"), "DEVICE_FAILED"),
        (RuntimeError("shapes do not match"), "INTERNAL"),
        (EngineError("RANK_LOST", "gone"), "RANK_LOST"),
    ],
)
def test_a_failure_has_a_reason_that_tells_whose_it_is(error: Exception, reason: str) -> None:
    known = as_engine_error(error)
    assert known.reason == reason
    assert "\n" not in known.message


def test_an_error_that_is_typed_stays_itself() -> None:
    error = ModelError("INVALID_MODEL", "no weights")
    assert as_engine_error(error) is error
