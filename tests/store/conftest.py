from __future__ import annotations

import asyncio
import itertools
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator

import pytest

from phalanx.cli.local.embedded_etcd import command, free_port, wait_until_healthy
from phalanx.store.etcd import EtcdStore
from phalanx.store.interface import Change, Store
from phalanx.store.memory import MemoryStore

DEADLINE_S = 20.0
_roots = itertools.count()


@pytest.fixture(scope="session")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint of one etcd that all tests share which do not stop it."""
    client, peer = free_port(), free_port()
    data_dir = tmp_path_factory.mktemp("etcd")
    arguments = command(data_dir, f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}")
    with subprocess.Popen(arguments) as process:
        yield f"127.0.0.1:{client}"
        process.terminate()


@pytest.fixture(params=["memory", "etcd"])
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    """Both stores, one after the other."""
    if request.param == "memory":
        opened: Store = MemoryStore()
    else:
        endpoint = request.getfixturevalue("shared_etcd")
        await wait_until_healthy(endpoint, DEADLINE_S)
        opened = EtcdStore([endpoint])
    yield opened
    await opened.close()


@pytest.fixture
def root() -> str:
    """A prefix that no other test uses."""
    return f"/test/{next(_roots)}/"


async def until(
    changes: AsyncGenerator[Change, None], holds: Callable[[Change], bool], timeout_s: float = DEADLINE_S
) -> list[Change]:
    """The changes up to and including the first one for which `holds` is true."""
    seen: list[Change] = []

    async def read() -> None:
        async for change in changes:
            seen.append(change)
            if holds(change):
                return

    # Reads in its own task, so that the deadline ends the test and does not cancel a read of the stream.
    reader = asyncio.ensure_future(read())
    done, _ = await asyncio.wait([reader], timeout=timeout_s)
    if not done:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        pytest.fail(f"not within {timeout_s} s; seen: {[dict(change.changed) for change in seen]}")
    await reader
    return seen
