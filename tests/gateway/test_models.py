"""The models of a gateway: GetModel, ListModels and the client's list."""

from __future__ import annotations

import grpc
import pytest

from phalanx.runtime import paging, rpc
from phalanx.store.interface import Put
from phalanx.store.records import DeploymentRecord, encode
from phalanx.v1 import inference_pb2, inference_pb2_grpc
from tests.gateway.conftest import KEYS, Rig
from tests.until import until

NAMES = ["a", "b", "demo"]


@pytest.fixture
async def stub(rig: Rig) -> inference_pb2_grpc.InferenceServiceAsyncStub:
    """A stub on a gateway with three deployments, of which "demo" has a replica."""
    await rig.add_leader("demo-0")
    for name in "ba":
        record = DeploymentRecord(name, 1, f"/models/{name}", created_at=1_700_000_000.25)
        await rig.store.txn([], [Put(KEYS.deployment(name), encode(record))])
    await until(lambda: len(rig.gateway.snapshot.deployments) == len(NAMES))
    return rig.client._stubs[0]  # type: ignore[no-any-return]


async def test_a_model_is_shown_by_its_name(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    model = (await stub.GetModel(inference_pb2.GetModelRequest(name="demo"))).model
    assert (model.name, model.ready_replicas) == ("demo", 1)
    waiting = (await stub.GetModel(inference_pb2.GetModelRequest(name="a"))).model
    assert (waiting.ready_replicas, waiting.max_model_len) == (0, 0)
    assert waiting.create_time.ToJsonString() == "2023-11-14T22:13:20.250Z"


async def test_an_unknown_model_is_not_found(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetModel(inference_pb2.GetModelRequest(name="nobody"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert rpc.to_error(caught.value).reason == "UNKNOWN_MODEL"


async def test_models_have_pages(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    first = await stub.ListModels(inference_pb2.ListModelsRequest(page_size=2))
    assert [model.name for model in first.models] == ["a", "b"]
    request = inference_pb2.ListModelsRequest(page_size=2, page_token=first.next_page_token)
    second = await stub.ListModels(request)
    assert ([model.name for model in second.models], second.next_page_token) == (["demo"], "")


async def test_models_are_filtered_by_name(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    response = await stub.ListModels(inference_pb2.ListModelsRequest(filter='name = "b"'))
    assert [model.name for model in response.models] == ["b"]


async def test_a_bad_filter_is_refused_with_its_field(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ListModels(inference_pb2.ListModelsRequest(filter='ready_replicas = "1"'))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "ready_replicas is not a field to filter by; these are: name" in str(caught.value.details())


async def test_the_client_lists_the_models_of_every_page(
    rig: Rig, stub: inference_pb2_grpc.InferenceServiceAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paging, "DEFAULT_PAGE_SIZE", 1)
    assert [model.name for model in await rig.client.models()] == NAMES
