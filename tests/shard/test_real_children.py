"""The worker with the engine and the text process that it is made for."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from dataplane.shard.children import Commands
from phalanx.internal.v1 import shard_pb2
from phalanx.store.records import ShardState
from phalanx.v1 import types_pb2

from .conftest import Cluster, Gateway

PROMPT = "def __init__(self"
TOKENS = 24
GREEDY = {"sampling": {"temperature": 0.0}, "stopping": {"max_tokens": TOKENS, "ignore_eos": True}}
REAL = Commands()
FORKED = Commands(forkserver=(sys.executable, "-m", "engine.processes.forkserver"))
START_S = 100.0  # importing torch in three processes on a busy machine

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


async def complete(gateway: Gateway, request_id: str, **fields: object) -> list[shard_pb2.Delta]:
    await gateway.submit(request_id, **(GREEDY | fields))
    return await gateway.until_finished(request_id)


def tokens(deltas: list[shard_pb2.Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def text(deltas: list[shard_pb2.Delta]) -> str:
    return "".join(piece for delta in deltas for piece in delta.pieces)


async def test_an_attempt_goes_on_in_the_next_epoch_with_the_same_tokens_and_text(
    cluster: Cluster, demo_model: Path
) -> None:
    async with cluster.worker("worker-0", REAL), cluster.worker("worker-1", REAL):
        epoch = await cluster.assign("worker-0", "worker-1", model=str(demo_model))
        ready = await cluster.until_state(ShardState.READY, deadline_s=START_S)
        async with cluster.gateway(epoch) as gateway:
            hello = await gateway.hello()
            assert (hello.model_hash, hello.max_model_len) == (ready.model_hash, ready.max_model_len)
            whole = await complete(gateway, "whole", text=PROMPT)
            (accepted,) = [item for frame in gateway.seen for item in frame.accepted]
            assert tokens(whole) == tokens(await complete(gateway, "again", text=PROMPT))
            assert len(tokens(whole)) == TOKENS
        victim = await cluster.until_state(ShardState.READY, rank=1)
        os.kill(victim.engine_pid, signal.SIGKILL)
        await cluster.until_state(ShardState.FAILED)

        epoch = await cluster.assign("worker-0", "worker-1", model=str(demo_model))
        again = await cluster.until_state(ShardState.READY, deadline_s=START_S)
        assert again.text_pid == ready.text_pid
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            rest = await complete(
                gateway,
                "whole",
                attempt=2,
                token_ids=types_pb2.TokenIds(ids=accepted.prompt_ids),
                prior=[{"token_ids": tokens(whole)[:10]}],
                model_hash=ready.model_hash,
            )
        assert rest[0].index == 10
        assert tokens(rest) == tokens(whole)[10:]
        pieces = [piece for delta in whole for piece in delta.pieces]
        assert text(rest) == "".join(pieces[10:])


async def test_a_stop_text_cuts_the_completion_and_frees_the_engine(
    cluster: Cluster, demo_model: Path
) -> None:
    async with cluster.worker(commands=FORKED):
        epoch = await cluster.assign("worker-0", model=str(demo_model))
        await cluster.until_state(ShardState.READY, deadline_s=START_S)
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            whole = text(await complete(gateway, "whole", text=PROMPT))
            stop = whole[8:11]
            stopping = {"max_tokens": TOKENS, "ignore_eos": True, "stop": [stop]}
            cut = await complete(gateway, "cut", text=PROMPT, stopping=stopping)
            assert cut[-1].finish_reason == types_pb2.FINISH_REASON_STOP
            assert text(cut) == whole[: whole.index(stop)]
            await gateway.until(lambda frame: frame.load.running == 0)


async def test_a_directory_without_a_model_fails_for_good(cluster: Cluster, tmp_path: Path) -> None:
    async with cluster.worker(commands=REAL):
        await cluster.assign("worker-0", model=str(tmp_path))
        failed = await cluster.until_state(ShardState.FAILED, deadline_s=START_S)
        assert failed.permanent
        assert str(tmp_path) in failed.reason
