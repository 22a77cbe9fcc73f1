"""Connections break, but the processes at both ends live."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.cluster import Cluster
from tests.faults.hurt import cut_connections
from tests.faults.streams import MODES, Stream, shards, stream_all

WHOSE: dict[str, Callable[[Cluster], int]] = {
    "a gateway": lambda cluster: cluster.process("gateway-0"),
    "a leader's worker": lambda cluster: int(shards(cluster, f"{cluster.model}-0")[0]["server_pid"]),
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("whose", WHOSE)
def test_no_stream_is_lost_with_its_connection(
    cluster: Cluster, undisturbed: dict[str, list[Stream]], whose: str
) -> None:
    pid, cut = WHOSE[whose](cluster), 0

    def cut_all() -> None:
        nonlocal cut
        cut = cut_connections(pid)

    assert asyncio.run(stream_all(cluster, MODES["sampled"], cut_all)) == undisturbed["sampled"]
    assert cut >= 2, "a client's or a gateway's, and the store's"
    assert WHOSE[whose](cluster) == pid, "it lives"
