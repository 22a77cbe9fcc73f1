"""The reason that is given for the end of a program."""

from __future__ import annotations

from pathlib import Path

import pytest

from phalanx.cli.local.logtail import exit_reason


@pytest.mark.parametrize(
    ("last", "code", "says"),
    [
        (
            '{"event": "stopping", "exception": "Traceback:\\n  x\\nOSError: in use"}',
            1,
            "exited with code 1: OSError: in use",
        ),
        ('{"level": "error", "event": "no such device"}', 3, "exited with code 3: no such device"),
        ("Segmentation fault", -11, "was killed by SIGSEGV: Segmentation fault"),
        ('{"level": "info", "event": "serving"}', -9, "was killed by SIGKILL"),
        ("", -9, "was killed by SIGKILL"),
    ],
)
def test_an_exit_is_told_with_its_last_words(tmp_path: Path, last: str, code: int, says: str):
    path = tmp_path / "worker-0.log"
    path.write_text(f"earlier\n{last}\n" if last else "")
    assert exit_reason("worker-0", code, path) == f"worker-0 {says} (log: {path})"
