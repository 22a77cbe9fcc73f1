"""The lock on the state directory of a local cluster."""

from __future__ import annotations

import os
from pathlib import Path

from phalanx.cli.local import lock


def test_the_lock_has_one_holder_and_ends_with_it(tmp_path: Path):
    fd = lock.take(tmp_path)
    assert fd is not None
    lock.sign(fd)
    assert lock.take(tmp_path) is None
    assert lock.holder(tmp_path) == os.getpid()
    os.close(fd)
    again = lock.take(tmp_path)
    assert again is not None
    os.close(again)
