from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path

from phalanx.cli.local import embedded_etcd as embedded
from phalanx.runtime import rpc
from phalanx.store.etcd import EtcdStore
from phalanx.store.keys import Keys
from phalanx.store.snapshot import Snapshot

from .conftest import DEADLINE_S

KEYS = Keys("test")


async def test_a_worker_announces_itself_registers_and_leaves_at_sigterm(tmp_path: Path) -> None:
    async with embedded.running(tmp_path) as etcd:
        reading, writing = os.pipe()
        worker = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "dataplane.shard.main", "--etcd", etcd.endpoint, "--cluster", "test"),
            *("--name", "worker-7", "--host", "box", "--ready-fd", str(writing)),
            pass_fds=(writing,),
        )
        os.close(writing)
        with os.fdopen(reading) as pipe:
            address = json.loads(await asyncio.to_thread(pipe.readline))["grpc"]
        store = EtcdStore([etcd.endpoint])
        async with asyncio.timeout(DEADLINE_S), contextlib.aclosing(store.watch(KEYS.root)) as changes:
            async for change in changes:
                workers = Snapshot.of(change.listing, KEYS).workers
                if workers:
                    break
        record = workers["worker-7"]
        assert (record.address, record.host, record.device) == (address, "box", "cpu")
        assert record.server_pid == worker.pid
        async with rpc.channel(address) as channel:
            async with asyncio.timeout(DEADLINE_S):
                await channel.channel_ready()
        worker.terminate()
        async with asyncio.timeout(DEADLINE_S):
            assert await worker.wait() == 0
        left = Snapshot.of(await store.list(KEYS.root), KEYS)
        assert not left.workers
        await store.close()
