from __future__ import annotations

import os
from pathlib import Path

import pytest

from dataplane.shard.device import memory_bytes

HOST = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("limit", "expected"), [("max\n", HOST), ("1048576\n", 1 << 20), (f"{1 << 60}\n", HOST)]
)
def test_a_cpu_has_the_memory_of_its_host_or_of_its_container(
    tmp_path: Path, limit: str, expected: int
) -> None:
    (tmp_path / "memory.max").write_text(limit)
    assert memory_bytes("cpu", tmp_path / "memory.max") == expected


def test_a_host_without_containers_has_all_of_its_memory(tmp_path: Path) -> None:
    assert memory_bytes("cpu", tmp_path / "none") == HOST


def test_the_memory_of_a_device_that_is_not_there_is_not_known() -> None:
    assert memory_bytes("cuda:99") == 0
