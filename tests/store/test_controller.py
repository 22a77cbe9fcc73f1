"""The controller process on a real etcd."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from phalanx.cli.local.embedded_etcd import Etcd, running
from phalanx.runtime import rpc
from phalanx.store.etcd import EtcdStore
from phalanx.store.interface import Put
from phalanx.store.keys import Keys
from phalanx.store.records import ControllerRecord, WorkerRecord, decode, encode
from phalanx.store.snapshot import Snapshot
from phalanx.v1 import control_pb2, control_pb2_grpc
from tests.store.conftest import DEADLINE_S, until

KEYS = Keys()


@contextlib.asynccontextmanager
async def controller(etcd: Etcd, name: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A controller process and the address that it announced."""
    ready, announce = os.pipe()
    arguments = ["--etcd", etcd.endpoint, "--name", name, "--ready-fd", str(announce)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "controlplane.main", *arguments, pass_fds=[announce]
    )
    os.close(announce)
    try:
        with os.fdopen(ready) as pipe:
            line = await asyncio.to_thread(pipe.readline)
        yield process, json.loads(line)["grpc"]
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
async def etcd(tmp_path: Path) -> AsyncIterator[Etcd]:
    async with running(tmp_path / "etcd") as process:
        yield process


@pytest.fixture
async def store(etcd: Etcd) -> AsyncIterator[EtcdStore]:
    opened = EtcdStore([etcd.endpoint])
    yield opened
    await opened.close()


async def active(store: EtcdStore, name: str) -> ControllerRecord:
    """Wait until the controller of this name is the active one."""
    async with contextlib.aclosing(store.watch(KEYS.controller_lock)) as changes:
        seen = await until(
            changes,
            lambda change: any(
                decode(ControllerRecord, entry.value).controller == name
                for entry in change.listing.entries.values()
            ),
        )
    return decode(ControllerRecord, seen[-1].listing.entries[KEYS.controller_lock].value)


async def formed(store: EtcdStore, replica: str) -> Snapshot:
    """Wait until a replica has an assignment."""
    async with contextlib.aclosing(store.watch(KEYS.root)) as changes:
        seen = await until(changes, lambda change: KEYS.assignment(replica) in change.listing.entries)
    return Snapshot.of(seen[-1].listing, KEYS)


async def apply(address: str, name: str) -> None:
    async with rpc.channel(address) as channel:
        spec = control_pb2.DeploymentSpec(name=name, model="/elsewhere/model")
        request = control_pb2.ApplyDeploymentRequest(spec=spec)
        await control_pb2_grpc.ControlServiceStub(channel).ApplyDeployment(
            request, timeout=DEADLINE_S, wait_for_ready=True
        )


async def join(store: EtcdStore, worker: str) -> None:
    record = WorkerRecord(worker, "boot", "host", f"{worker}:1", "cpu", 1)
    await store.txn([], [Put(KEYS.worker(worker), encode(record))])


async def test_a_controller_leads_forms_and_resigns_at_sigterm(etcd: Etcd, store: EtcdStore) -> None:
    await join(store, "w0")
    async with controller(etcd, "c0") as (process, address):
        assert (await active(store, "c0")).address == address
        await apply(address, "a")
        assert (await formed(store, "a-0")).replicas["a-0"].assignment.members[0].worker == "w0"
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            assert await process.wait() == 0
        assert await store.get(KEYS.controller_lock) is None


async def test_another_controller_takes_over_from_one_that_was_killed(etcd: Etcd, store: EtcdStore) -> None:
    await join(store, "w0")
    async with controller(etcd, "c0") as (first, _):
        await active(store, "c0")
        async with controller(etcd, "c1") as (_, address):
            await apply(address, "a")  # any controller stores it; the active one forms it
            await formed(store, "a-0")
            first.kill()
            await active(store, "c1")
            await join(store, "w1")
            await apply(address, "b")
            await formed(store, "b-0")


async def test_a_controller_survives_a_restart_of_etcd(etcd: Etcd, store: EtcdStore) -> None:
    await join(store, "w0")
    async with controller(etcd, "c0") as (process, address):
        await active(store, "c0")
        etcd.kill()
        async with rpc.channel(address) as channel:
            stub = control_pb2_grpc.ControlServiceStub(channel)
            shown = await stub.ListWorkers(control_pb2.ListWorkersRequest(), timeout=DEADLINE_S)
        assert [worker.worker for worker in shown.workers] == ["w0"]
        await etcd.restart()
        await active(store, "c0")
        await apply(address, "a")
        await formed(store, "a-0")
        assert process.returncode is None
