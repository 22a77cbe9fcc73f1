"""ControlService: writes with etags, and writes that are only validated."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path

import grpc

from phalanx.store.interface import Put
from phalanx.store.records import DeploymentRecord, decode, encode
from phalanx.v1 import control_pb2
from tests.unit.controlplane.conftest import KEYS, Controller, model_dir, refusal


async def test_an_etag_changes_with_the_spec_alone(controller: Controller) -> None:
    created = (await controller.apply()).deployment
    await controller.join("w0")
    unchanged = (await controller.apply()).deployment
    assert unchanged.etag == created.etag
    changed = (await controller.apply(replicas=2)).deployment
    assert changed.etag != created.etag
    request = control_pb2.GetDeploymentRequest(name="a")
    assert (await controller.stub.GetDeployment(request)).deployment.etag == changed.etag


async def test_a_change_that_is_based_on_the_stored_version_is_made(controller: Controller) -> None:
    read = (await controller.apply()).deployment
    answer = await controller.request(replicas=2, etag=read.etag)
    assert (answer.changed, answer.deployment.spec.replicas) == (True, 2)


async def test_a_change_that_is_based_on_an_earlier_version_is_aborted(controller: Controller) -> None:
    read = (await controller.apply()).deployment
    await controller.apply(replicas=2)
    error = await refusal(controller.request(replicas=3, etag=read.etag))
    assert (error.reason, error.code) == ("ETAG_MISMATCH", grpc.StatusCode.ABORTED)
    assert "at revision 2 now" in error.message
    assert controller.view.snapshot.deployments["a"].replicas == 2


async def test_of_two_changes_based_on_one_version_only_one_is_made(controller: Controller) -> None:
    read = (await controller.apply()).deployment
    answers = await asyncio.gather(
        *(controller.request(replicas=number, etag=read.etag) for number in range(2, 8)),
        return_exceptions=True,
    )
    made = [answer for answer in answers if isinstance(answer, control_pb2.ApplyDeploymentResponse)]
    assert len(made) == 1
    assert controller.view.snapshot.deployments["a"].revision == 2


async def test_a_write_that_comes_in_between_is_not_overwritten(controller: Controller) -> None:
    for write in (partial(controller.request, tp=2), controller.delete):
        read = (await controller.apply()).deployment
        faster = replace(controller.view.snapshot.deployments["a"], revision=read.revision + 1, replicas=9)
        controller.store.overtaken_by = Put(KEYS.deployment("a"), encode(faster))
        assert (await refusal(write(etag=read.etag))).reason == "ETAG_MISMATCH"
        entry = await controller.store.get(KEYS.deployment("a"))
        assert decode(DeploymentRecord, entry.value) == faster


async def test_a_write_without_an_etag_is_made_after_one_that_comes_in_between(
    controller: Controller,
) -> None:
    read = (await controller.apply()).deployment
    faster = replace(controller.view.snapshot.deployments["a"], revision=read.revision + 1, replicas=9)
    controller.store.overtaken_by = Put(KEYS.deployment("a"), encode(faster))
    answer = await controller.request(replicas=2)
    assert (answer.deployment.revision, answer.deployment.spec.replicas) == (3, 2)


async def test_an_etag_does_not_fit_a_deployment_that_was_created_again(controller: Controller) -> None:
    read = (await controller.apply()).deployment
    await controller.delete()
    error = await refusal(controller.request(replicas=2, etag=read.etag))
    assert error.reason == "ETAG_MISMATCH"
    await controller.apply()
    error = await refusal(controller.request(replicas=2, etag=read.etag))
    assert error.reason == "ETAG_MISMATCH"


async def test_a_delete_of_an_earlier_version_is_aborted(controller: Controller) -> None:
    read = (await controller.apply()).deployment
    latest = (await controller.apply(replicas=2)).deployment
    error = await refusal(controller.delete(etag=read.etag))
    assert (error.reason, error.code) == ("ETAG_MISMATCH", grpc.StatusCode.ABORTED)
    assert "a" in controller.view.snapshot.deployments
    await controller.delete(etag=latest.etag)
    assert "a" not in controller.view.snapshot.deployments


async def test_a_validated_creation_shows_the_deployment_and_writes_nothing(controller: Controller) -> None:
    before = controller.view.snapshot.revision
    answer = await controller.request(tp=2, validate_only=True)
    assert answer.changed
    assert (answer.deployment.spec.tp, answer.deployment.revision) == (2, 1)
    assert answer.deployment.state == control_pb2.DEPLOYMENT_STATE_PENDING
    assert "needs 2 workers" in answer.deployment.reason
    assert answer.deployment.etag == ""
    assert (await controller.store.list(KEYS.root)).revision == before
    assert await controller.store.get(KEYS.deployment("a")) is None


async def test_a_validated_change_shows_the_next_revision_and_writes_nothing(controller: Controller) -> None:
    stored = (await controller.apply()).deployment
    answer = await controller.request(replicas=3, etag=stored.etag, validate_only=True)
    assert (answer.changed, answer.deployment.revision, answer.deployment.spec.replicas) == (True, 2, 3)
    assert controller.view.snapshot.deployments["a"].revision == 1
    unchanged = await controller.request(validate_only=True)
    assert (unchanged.changed, unchanged.deployment) == (False, stored)


async def test_validation_refuses_what_the_write_would_refuse(controller: Controller, tmp_path: Path) -> None:
    stored = (await controller.apply()).deployment
    await controller.apply(replicas=2)
    bad = (
        (controller.request(replicas=0, validate_only=True), "INVALID_ARGUMENT"),
        (controller.request(model=model_dir(tmp_path, weights=False), validate_only=True), "INVALID_MODEL"),
        (controller.request(replicas=3, etag=stored.etag, validate_only=True), "ETAG_MISMATCH"),
        (controller.delete(etag=stored.etag, validate_only=True), "ETAG_MISMATCH"),
    )
    for call, reason in bad:
        assert (await refusal(call)).reason == reason


async def test_a_validated_delete_removes_nothing(controller: Controller) -> None:
    assert (await refusal(controller.delete(validate_only=True))).reason == "UNKNOWN_DEPLOYMENT"
    stored = (await controller.apply()).deployment
    await controller.delete(etag=stored.etag, validate_only=True)
    assert await controller.store.get(KEYS.deployment("a")) is not None
