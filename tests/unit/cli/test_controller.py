"""Commands against a controller with scripted responses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner, Result

from phalanx.cli.failure import FAILED, NOT_FOUND
from phalanx.cli.main import main
from phalanx.cli.rollout import describe
from phalanx.v1 import control_pb2, control_pb2_grpc


class Controller(control_pb2_grpc.ControlServiceServicer):
    """Has three workers, one per page; records every request."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.target = ""

    def ListWorkers(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests.append(request)
        number = int(request.page_token or 0)
        worker = control_pb2.Worker(worker=f"w{number}", state=control_pb2.WORKER_STATE_DRAINING)
        token = str(number + 1) if number < 2 else ""
        return control_pb2.ListWorkersResponse(workers=[worker], next_page_token=token)

    def GetWorker(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests.append(request)
        if request.name != "w1":
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no worker {request.name!r}")
        worker = control_pb2.Worker(worker="w1", state=control_pb2.WORKER_STATE_FREE)
        return control_pb2.GetWorkerResponse(worker=worker)

    def ApplyDeployment(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests.append(request)
        if request.spec.name == "changed":
            context.abort(grpc.StatusCode.ABORTED, "deployment 'changed' has changed")
        return control_pb2.ApplyDeploymentResponse(changed=True)


@pytest.fixture
def controller() -> Iterator[Controller]:
    servicer = Controller()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    control_pb2_grpc.add_ControlServiceServicer_to_server(servicer, server)
    servicer.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(None)


def phalanx(controller: Controller, *arguments: str, input: str = "") -> Result:
    line = [*arguments, "--controller", controller.target]
    return CliRunner().invoke(main, line, input=input)


def test_get_shows_the_items_of_every_page(controller: Controller) -> None:
    result = phalanx(controller, "get", "workers", "-o", "json")
    assert [row["worker"] for row in json.loads(result.stdout)] == ["w0", "w1", "w2"]
    assert {row["state"] for row in json.loads(result.stdout)} == {"draining"}
    assert [request.page_token for request in controller.requests] == ["", "1", "2"]


def test_a_table_shows_states_as_words(controller: Controller) -> None:
    assert phalanx(controller, "get", "workers").stdout.count("draining") == 3


def test_get_with_a_name_asks_for_it_alone(controller: Controller) -> None:
    result = phalanx(controller, "get", "workers", "w1", "-o", "json")
    assert [(row["worker"], row["state"]) for row in json.loads(result.stdout)] == [("w1", "free")]
    assert controller.requests == [control_pb2.GetWorkerRequest(name="w1")]


def test_get_with_an_unknown_name_is_not_found(controller: Controller) -> None:
    result = phalanx(controller, "get", "workers", "w9")
    assert (result.exit_code, result.stderr) == (NOT_FOUND, "phalanx: there is no worker 'w9'\n")


@pytest.mark.parametrize(
    ("options", "dry", "says"),
    [((), False, "deployment a configured\n"), (("--dry-run",), True, "deployment a configured (dry run)\n")],
)
def test_apply_writes_unless_it_is_a_dry_run(
    controller: Controller, options: tuple[str, ...], dry: bool, says: str
) -> None:
    result = phalanx(controller, "apply", "-f", "-", *options, input="name: a\nmodel: /m\n")
    assert result.stdout == says
    assert [request.validate_only for request in controller.requests] == [dry]


def test_apply_tells_what_the_controller_refuses(controller: Controller, tmp_path: Path) -> None:
    file = tmp_path / "changed.yaml"
    file.write_text("name: changed\nmodel: /m\n")
    result = phalanx(controller, "apply", "-f", str(file))
    assert (result.exit_code, result.stderr) == (FAILED, "phalanx: deployment 'changed' has changed\n")


def test_a_roll_out_describes_the_state_in_words() -> None:
    deployment = control_pb2.Deployment(
        spec=control_pb2.DeploymentSpec(name="a", replicas=2),
        state=control_pb2.DEPLOYMENT_STATE_DEGRADED,
        ready_replicas=1,
    )
    assert describe(deployment, []) == "deployment a is degraded: 1 of 2 replicas ready"
