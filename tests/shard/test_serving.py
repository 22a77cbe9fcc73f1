from __future__ import annotations

import asyncio

import grpc
import pytest

from dataplane.shard import drain
from dataplane.shard.server import ShardServer
from phalanx.internal.v1 import shard_pb2
from phalanx.store.records import ShardState
from phalanx.v1 import types_pb2
from tests.until import until

from .conftest import DEADLINE_S, Cluster, Gateway
from .fake_engine import HOLD, REFUSE


def ids(*tokens: int) -> types_pb2.TokenIds:
    return types_pb2.TokenIds(ids=tokens)


async def refusal(gateway: Gateway) -> grpc.aio.AioRpcError:
    try:
        await gateway.hello()
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the stream was admitted")


async def test_a_request_is_accepted_and_then_streams_every_position_in_order(cluster: Cluster) -> None:
    async with cluster.worker():
        epoch, _ = await cluster.form()
        async with cluster.gateway(epoch) as gateway:
            hello = await gateway.hello()
            assert (hello.worker, hello.replica, hello.epoch) == ("worker-0", "d-0", epoch)
            assert (hello.model_hash, hello.max_model_len, hello.eos_token_ids) == ("hash-1", 4096, [2])
            await gateway.submit(text="ab")
            deltas = await gateway.until_finished()
        accepted = [(n, item) for n, frame in enumerate(gateway.seen) for item in frame.accepted]
        first_delta = next(n for n, frame in enumerate(gateway.seen) if frame.deltas)
        assert [list(item.prompt_ids) for _, item in accepted] == [[97, 98]]
        assert accepted[0][0] <= first_delta
        assert [delta.index for delta in deltas] == [0, 1, 2, 3]
        assert [list(delta.token_ids) for delta in deltas] == [[97], [98], [99], [100]]
        assert [list(delta.pieces) for delta in deltas] == [["<97>"], ["<98>"], ["<99>"], ["<100>"]]
        assert deltas[-1].finish_reason == types_pb2.FINISH_REASON_LENGTH
        steps = [frame.step for frame in gateway.seen]
        assert steps == sorted(set(steps))
        assert {frame.epoch for frame in gateway.seen} == {epoch}


async def test_each_gateway_sees_its_own_requests_only(cluster: Cluster) -> None:
    async with cluster.worker():
        epoch, _ = await cluster.form()
        async with cluster.gateway(epoch) as one, cluster.gateway(epoch) as other:
            await one.hello()
            await other.hello()
            await one.submit(token_ids=ids(10))
            await other.submit(token_ids=ids(20))
            assert [delta.token_ids[0] for delta in await one.until_finished()] == [10, 11, 12, 13]
            assert [delta.token_ids[0] for delta in await other.until_finished()] == [20, 21, 22, 23]


async def test_a_replay_goes_on_after_prior_output_and_leaves_finished_choices_alone(
    cluster: Cluster,
) -> None:
    async with cluster.worker():
        epoch, _ = await cluster.form()
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            prior = [{"token_ids": [5, 6]}, {"choice": 1, "token_ids": [6], "finish_reason": 1}]
            await gateway.submit(token_ids=ids(5), n=2, prior=prior, attempt=2, model_hash="hash-1")
            deltas = await gateway.until_finished()
        assert {delta.choice for delta in deltas} == {0}
        assert [delta.index for delta in deltas] == [2, 3]
        assert {delta.attempt for delta in deltas} == {2}


async def test_a_stop_text_ends_its_choice_and_the_engine_is_told(cluster: Cluster) -> None:
    async with cluster.worker():
        epoch, _ = await cluster.form()
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            stop = f"<{HOLD + 1}>"
            await gateway.submit(token_ids=ids(HOLD), stopping={"max_tokens": 100, "stop": [stop]})
            deltas = await gateway.until_finished()
            assert deltas[-1].finish_reason == types_pb2.FINISH_REASON_STOP
            assert [list(delta.token_ids) for delta in deltas] == [[HOLD], [HOLD + 1]]
            later = await gateway.until(lambda frame: frame.load.running == 0)
            assert not any(frame.deltas for frame in later)


async def test_a_cancelled_attempt_leaves_the_engine(cluster: Cluster) -> None:
    async with cluster.worker():
        epoch, _ = await cluster.form()
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            await gateway.submit(token_ids=ids(HOLD), stopping={"max_tokens": 100})
            await gateway.until(lambda frame: frame.load.running == 1)
            await gateway.cancel()
            await gateway.cancel()
            await gateway.until(lambda frame: frame.load.running == 0)


async def test_a_cancel_during_tokenisation_keeps_the_attempt_from_starting(cluster: Cluster) -> None:
    async with cluster.worker():
        epoch, _ = await cluster.form()
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            await gateway.submit("lost", text="wait")
            await gateway.cancel("lost")
            await gateway.submit("lost", text="ab")
            await gateway.submit("kept", text="ab")
            await gateway.until_finished("kept")
        assert {item.request_id for frame in gateway.seen for item in frame.accepted} == {"kept"}


async def test_a_broken_stream_cancels_its_requests_and_no_others(cluster: Cluster) -> None:
    async with cluster.worker():
        epoch, _ = await cluster.form()
        async with cluster.gateway(epoch) as other:
            await other.hello()
            await other.submit(token_ids=ids(HOLD), stopping={"max_tokens": 100})
            async with cluster.gateway(epoch) as gateway:
                await gateway.hello()
                await gateway.submit(token_ids=ids(HOLD), stopping={"max_tokens": 100})
                await other.until(lambda frame: frame.load.running == 2)
            await other.until(lambda frame: frame.load.running == 1)


async def test_a_deadline_ends_the_attempt_with_its_error(cluster: Cluster) -> None:
    async with cluster.worker():
        epoch, _ = await cluster.form()
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            await gateway.submit(token_ids=ids(HOLD), stopping={"max_tokens": 100}, deadline_ms=50)
            failed = await gateway.until_failed()
            assert (failed.error.reason, failed.error.retryable) == ("DEADLINE_EXCEEDED", True)
            await gateway.until(lambda frame: frame.load.running == 0)


async def test_a_request_pinned_to_another_model_is_refused(cluster: Cluster) -> None:
    async with cluster.worker():
        epoch, _ = await cluster.form()
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            await gateway.submit(token_ids=ids(5), model_hash="hash-0")
            failed = await gateway.until_failed()
            assert (failed.error.reason, failed.error.retryable) == ("MODEL_CHANGED", True)


async def test_refusals_of_the_engine_and_of_the_text_process_reach_the_gateway(cluster: Cluster) -> None:
    async with cluster.worker():
        epoch, _ = await cluster.form()
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            await gateway.submit("long", token_ids=ids(REFUSE))
            assert (await gateway.until_failed()).error.reason == "PROMPT_TOO_LONG"
            await gateway.submit("chat", text="refuse")
            assert (await gateway.until_failed()).error.reason == "NO_CHAT_TEMPLATE"


async def test_a_worker_that_leads_nothing_refuses(cluster: Cluster) -> None:
    async with cluster.worker(), cluster.gateway(1) as gateway:
        error = await refusal(gateway)
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "not the ready leader" in (error.details() or "")


async def test_another_epoch_is_refused(cluster: Cluster) -> None:
    async with cluster.worker():
        epoch, _ = await cluster.form()
        for wrong in (epoch - 1, epoch + 1):
            async with cluster.gateway(wrong) as gateway:
                error = await refusal(gateway)
                assert f"is in epoch {epoch}" in (error.details() or "")


async def test_a_shard_that_is_not_the_leader_refuses(cluster: Cluster) -> None:
    async with cluster.worker("worker-0"), cluster.worker("worker-1"):
        epoch = await cluster.assign("worker-0", "worker-1")
        await cluster.until_state(ShardState.READY, rank=0)
        await cluster.until_state(ShardState.READY, rank=1)
        async with cluster.gateway(epoch, "worker-1") as gateway:
            assert "not the ready leader" in ((await refusal(gateway)).details() or "")


async def test_a_gateway_that_closes_its_side_ends_the_stream_in_order(cluster: Cluster) -> None:
    async with cluster.worker():
        epoch, _ = await cluster.form()
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            await gateway.call.done_writing()
            while (response := await gateway.call.read()) is not grpc.aio.EOF:
                assert response.WhichOneof("frame") == "step"
            assert await gateway.call.code() is grpc.StatusCode.OK


async def test_workers_that_are_told_to_leave_wait_for_the_requests_of_their_replica(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain, "_UNROUTABLE_S", 0.0)
    names = ("worker-0", "worker-1")
    answers: list[int] = []
    pending = ShardServer.pending

    def counted(server: ShardServer, request: shard_pb2.PendingRequest) -> shard_pb2.PendingResponse:
        answer = pending(server, request)
        answers.append(answer.requests)
        return answer

    monkeypatch.setattr(ShardServer, "pending", counted)
    async with cluster.worker(names[0], drain_s=60.0), cluster.worker(names[1], drain_s=60.0):
        epoch = await cluster.assign(*names)
        await cluster.until_state(ShardState.READY, rank=1)
        await cluster.until_state(ShardState.READY)
        async with cluster.gateway(epoch) as gateway:
            await gateway.hello()
            await gateway.submit(token_ids=ids(HOLD), stopping={"max_tokens": 100})
            await gateway.until(lambda frame: frame.load.running == 1)
            for name in names:
                cluster.stops[name].set()
            await cluster.until(lambda snapshot: all(one.draining for one in snapshot.workers.values()))
            await until(lambda: len(answers) >= 6)  # both workers ask, every tenth of a second
            assert set(answers) == {1}
            assert not any(running.done() for running in cluster.running.values())
            await gateway.cancel()
            async with asyncio.timeout(DEADLINE_S):
                await asyncio.wait(cluster.running.values())
            assert answers[-1] == 0, "the follower has asked, too"
