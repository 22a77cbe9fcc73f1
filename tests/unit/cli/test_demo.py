"""The demo's verdict: it passes only if every token is the same and the stream failed over."""

from __future__ import annotations

import dataclasses

import pytest

from phalanx.cli import demo, sse
from phalanx.cli.failure import Failure

WHOLE = sse.Completion("demo-0", [1, 2, 3], "abc", [0.0, 0.01, 0.02], "length", {"completion_tokens": 3})


def killed(**changes: object) -> demo.Killed:
    return demo.Killed(dataclasses.replace(WHOLE, **changes), at=2, gap_s=0.2)  # type: ignore[arg-type]


def test_equal_streams_pass_and_the_gap_is_told(capsys: pytest.CaptureFixture[str]):
    demo._report(WHOLE, killed(), failovers=1)
    printed = capsys.readouterr().out
    assert "3 of 3" in printed
    assert "200 ms (10.0 ms between events undisturbed)" in printed


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"token_ids": [1, 2, 4]}, "token_ids"),
        ({"token_ids": [1, 2]}, "token_ids"),
        ({"token_ids": [1, 2, 3, 3]}, "token_ids"),
        ({"text": "ab"}, "text"),
        ({"finish_reason": "stop"}, "finish_reason"),
        ({"usage": {"completion_tokens": 4}}, "usage"),
    ],
)
def test_one_difference_fails(changes: dict[str, object], what: str):
    with pytest.raises(Failure, match=what):
        demo._report(WHOLE, killed(**changes), failovers=1)


def test_a_kill_that_nobody_felt_fails():
    with pytest.raises(Failure, match="did not fail over"):
        demo._report(WHOLE, killed(), failovers=0)
