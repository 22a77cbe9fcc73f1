from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dataplane.shard import outbox, watchdog
from dataplane.shard.children import Commands
from dataplane.shard.server import SERVICE
from engine.ipc.wire import Step
from engine.request import Load
from phalanx.runtime import rpc
from phalanx.store.records import ShardState
from phalanx.v1 import types_pb2

from .conftest import DEADLINE_S, FAKES, Cluster, Gateway
from .fake_engine import HOLD

PROMPT = types_pb2.TokenIds(ids=[HOLD])
LONG = {"max_tokens": 100}


async def end_of(gateway: Gateway) -> grpc.aio.AioRpcError:
    """How the stream fails."""
    try:
        await gateway.until(lambda _: False)
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the stream went on")


async def gone(pid: int) -> None:
    """Return once a process has ended."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        async with asyncio.timeout(DEADLINE_S):
            await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)


@pytest.mark.parametrize("victim", ["engine_pid", "text_pid"])
async def test_the_death_of_a_child_ends_streams_and_is_published(cluster: Cluster, victim: str) -> None:
    async with cluster.worker():
        epoch, shard = await cluster.form()
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            await gateway.submit(token_ids=PROMPT, stopping=LONG)
            await gateway.until(lambda frame: len(frame.deltas) > 0)
            os.kill(getattr(shard, victim), signal.SIGKILL)
            error = await end_of(gateway)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert rpc.to_error(error).reason == "UNREACHABLE"
            failed = await cluster.until_state(ShardState.FAILED)
            assert failed.reason.endswith("was killed by SIGKILL")
            assert (failed.epoch, failed.engine_pid, failed.permanent) == (epoch, 0, False)


async def test_a_new_epoch_serves_again_with_another_engine_and_the_same_text_process(
    cluster: Cluster,
) -> None:
    async with cluster.worker():
        _, first = await cluster.form()
        os.kill(first.engine_pid, signal.SIGKILL)
        await cluster.until_state(ShardState.FAILED)
        epoch, second = await cluster.form()
        assert second.engine_pid != first.engine_pid
        assert second.text_pid == first.text_pid
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            await gateway.submit(text="a")
            assert len(await gateway.until_finished()) == 4


async def test_a_step_of_an_earlier_engine_reaches_no_gateway(cluster: Cluster) -> None:
    async with cluster.worker() as worker:
        _, first = await cluster.form()
        assert worker._serving is not None
        old, text = worker._serving.engine, worker._serving.text
        os.kill(first.engine_pid, signal.SIGKILL)
        await cluster.until_state(ShardState.FAILED)
        epoch, _ = await cluster.form()
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            worker._received(text, Step(999, Load(running=77), engine=old))
            await gateway.submit(text="a")
            await gateway.until_finished()
        assert all(frame.load.running != 77 and frame.step < 999 for frame in gateway.seen)


@pytest.mark.parametrize("victim", ["engine", "text process"])
async def test_a_child_that_hangs_is_named_by_the_failure(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    monkeypatch.setattr(watchdog, "NO_HEARTBEAT_S", 60.0 if victim == "engine" else 1.5)
    async with cluster.worker():
        epoch, shard = await cluster.form()
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            await gateway.submit(text="a")
            await gateway.until_finished()  # the watchdog knows how long a step takes
        os.kill(shard.engine_pid if victim == "engine" else shard.text_pid, signal.SIGSTOP)
        failed = await cluster.until_state(ShardState.FAILED)
        how = "hangs: a canary" if victim == "engine" else "is stopped"
        assert failed.reason.startswith(f"the {victim} {how}")


async def test_a_new_epoch_ends_the_streams_and_the_engine_of_the_old_one(cluster: Cluster) -> None:
    async with cluster.worker():
        epoch, first = await cluster.form()
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            await cluster.form()
            assert (await end_of(gateway)).code() is grpc.StatusCode.UNAVAILABLE
        await gone(first.engine_pid)


async def test_the_failure_of_one_shard_ends_the_epoch_on_the_leader(cluster: Cluster) -> None:
    async with cluster.worker("worker-0"), cluster.worker("worker-1"):
        epoch = await cluster.assign("worker-0", "worker-1")
        await cluster.until_state(ShardState.READY)
        shard = await cluster.until_state(ShardState.READY, rank=1)
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            os.kill(shard.engine_pid, signal.SIGKILL)
            assert (await end_of(gateway)).code() is grpc.StatusCode.UNAVAILABLE
        leader = await cluster.until_state(ShardState.FAILED)
        assert leader.reason == "shard 1 failed: the engine was killed by SIGKILL"


async def test_the_last_words_of_an_engine_are_its_reason(cluster: Cluster) -> None:
    async with cluster.worker():
        await cluster.assign("worker-0", model="/models/unloadable")
        failed = await cluster.until_state(ShardState.FAILED)
        assert (failed.reason, failed.permanent) == ("INVALID_MODEL: no weights", True)


async def test_an_engine_that_breaks_the_protocol_is_killed_and_says_so(cluster: Cluster) -> None:
    async with cluster.worker():
        await cluster.assign("worker-0", model="/models/stray")
        failed = await cluster.until_state(ShardState.FAILED)
        assert failed.reason.startswith("the engine broke the protocol")


async def test_a_child_that_cannot_be_started_fails_the_epoch(cluster: Cluster) -> None:
    nothing = Commands(engine=("/nonexistent/engine",), text=FAKES.text)
    async with cluster.worker(commands=nothing):
        await cluster.assign("worker-0")
        failed = await cluster.until_state(ShardState.FAILED)
        assert failed.reason.startswith("the engine could not be started")


async def test_a_replica_that_is_dissolved_leaves_no_child_and_no_status(cluster: Cluster) -> None:
    async with cluster.worker():
        _, shard = await cluster.form()
        await cluster.dissolve()
        await cluster.until(lambda snapshot: not snapshot.shards)
        await gone(shard.engine_pid)
        await gone(shard.text_pid)


async def test_a_stopped_worker_kills_its_children_and_leaves_the_store(cluster: Cluster) -> None:
    async with cluster.worker():
        epoch, shard = await cluster.form()
        gateway = await cluster.gateway(epoch).__aenter__()
        await gateway.hello()
    assert (await end_of(gateway)).code() is grpc.StatusCode.UNAVAILABLE
    await gateway.__aexit__()
    for pid in (shard.engine_pid, shard.text_pid):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    snapshot = await cluster.until(lambda _: True)
    assert not snapshot.workers
    assert not snapshot.shards


async def test_a_lost_lease_is_replaced_and_serving_goes_on(cluster: Cluster) -> None:
    async with cluster.worker() as worker:
        epoch, _ = await cluster.form()
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            await cluster.store.revoke(1)
            assert not (await cluster.until(lambda _: True)).workers
            snapshot = await cluster.until(lambda snapshot: bool(snapshot.workers and snapshot.shards))
            assert snapshot.workers["worker-0"].incarnation == worker.incarnation
            shard = snapshot.shard("d-0", 0)
            assert shard is not None
            assert shard.state is ShardState.READY
            await gateway.submit(text="a")
            assert len(await gateway.until_finished()) == 4


async def test_a_gateway_that_does_not_read_loses_its_stream_and_blocks_nobody(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "MAX_FRAMES", 8)
    async with cluster.worker():
        epoch, _ = await cluster.form("/vast")
        async with cluster.gateway(epoch) as slow, cluster.gateway(epoch) as other:
            await slow.hello()
            await other.hello()
            # Its Accepted fills the transport's window, so that the leader's writes wait for the reader.
            wide = types_pb2.TokenIds(ids=[5] * 1_000_000)
            await slow.submit(token_ids=wide, stopping={"max_tokens": 20})
            await other.submit(token_ids=types_pb2.TokenIds(ids=[5]))
            assert len(await other.until_finished()) == 4
            assert (await end_of(slow)).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_health_tells_a_ready_leader_from_a_worker_that_is_merely_alive(cluster: Cluster) -> None:
    async with cluster.worker(), rpc.channel(cluster.addresses["worker-0"]) as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def status(service: str) -> int:
            answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
            return int(answer.status)

        assert await status("") == health_pb2.HealthCheckResponse.SERVING
        assert await status(SERVICE) == health_pb2.HealthCheckResponse.NOT_SERVING
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        try:
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            _, shard = await cluster.form()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            os.kill(shard.engine_pid, signal.SIGKILL)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        finally:
            watch.cancel()


def test_the_shard_server_loads_no_torch_and_no_rust_built_wheel() -> None:
    code = "import sys, dataplane.shard.main; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    heavy = {"torch", "transformers", "numpy"}
    rust = {"tokenizers", "safetensors", "pydantic_core", "orjson", "cryptography", "rpds", "hf_xet"}
    assert "grpc" in loaded
    assert not loaded & (heavy | rust)
