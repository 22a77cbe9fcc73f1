from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import Cluster


@pytest.fixture(scope="package")
def cluster(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One replica of one shard."""
    with Cluster.start(demo_model, tmp_path_factory.mktemp("interop")) as cluster:
        yield cluster
