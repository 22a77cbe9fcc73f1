from __future__ import annotations

import pytest

from phalanx.runtime.enums import word
from phalanx.v1 import control_pb2, types_pb2


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (control_pb2.WORKER_STATE_DRAINING, "draining"),
        (control_pb2.WORKER_STATE_UNSPECIFIED, ""),
        (1000, "1000"),  # of a newer version
    ],
)
def test_a_value_is_a_word(number: int, expected: str) -> None:
    assert word(control_pb2.WorkerState.DESCRIPTOR, number) == expected


def test_a_word_may_have_more_than_one_part() -> None:
    assert word(types_pb2.FinishReason.DESCRIPTOR, types_pb2.FINISH_REASON_TOOL_CALLS) == "tool_calls"
