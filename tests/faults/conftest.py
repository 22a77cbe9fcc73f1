from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster
from tests.faults.streams import MODES, Stream, stream_all


@pytest.fixture(scope="package")
def cluster(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder, gateways = tmp_path_factory.mktemp("faults"), ("--gateways", "2")
    with Cluster.start(demo_model, folder, replicas=2, tp=2, arguments=gateways) as cluster:
        yield cluster


@pytest.fixture(scope="package")
def undisturbed(cluster: Cluster) -> dict[str, list[Stream]]:
    """The streams of every mode, without a fault."""
    return {mode: asyncio.run(stream_all(cluster, options)) for mode, options in MODES.items()}
