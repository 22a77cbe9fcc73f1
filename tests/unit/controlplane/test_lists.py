"""ControlService: Get and List of every kind."""

from __future__ import annotations

import operator

import grpc
import pytest

from phalanx.store.interface import Put
from phalanx.store.records import AssignmentRecord, GatewayRecord, MemberRecord, encode
from phalanx.v1 import control_pb2
from tests.unit.controlplane.conftest import KEYS, Controller, refusal


@pytest.fixture
async def populated(controller: Controller) -> Controller:
    """Deployments a to c, of which a has a replica on w0 and w1; w2 is free; gateways g0 and g1."""
    for name in "cba":
        await controller.apply(name=name, tp=2, model=f"/models/{name}")
    await controller.join("w2", "w1", "w0")
    deployment = controller.view.snapshot.deployments["a"]
    members = tuple(MemberRecord(name, "boot", f"{name}:1") for name in ("w0", "w1"))
    gateways = [GatewayRecord(name, "boot", f"host-{name}", "h:1", "http://h:2", 7) for name in ("g1", "g0")]
    revision = await controller.store.txn(
        [],
        [
            Put(KEYS.assignment("a-0"), encode(AssignmentRecord("a-0", deployment, members))),
            *(Put(KEYS.gateway(gateway.gateway), encode(gateway)) for gateway in gateways),
        ],
    )
    assert revision is not None
    await controller.view.reached(revision)
    return controller


NAME_FIELDS = {"Deployment": "spec.name", "Replica": "replica", "Worker": "worker", "Gateway": "gateway"}


def name_of(kind: str, message: object) -> str:
    return str(operator.attrgetter(NAME_FIELDS[kind])(message))


async def listed(controller: Controller, kind: str, **options: object) -> list[list[str]]:
    """The names on each page of a list."""
    request = getattr(control_pb2, f"List{kind}sRequest")(**options)
    pages = []
    while True:
        response = await getattr(controller.stub, f"List{kind}s")(request, timeout=10)
        pages.append([name_of(kind, message) for message in getattr(response, f"{kind.lower()}s")])
        request.page_token = response.next_page_token
        if not request.page_token:
            return pages


@pytest.mark.parametrize(
    ("kind", "size", "pages"),
    [
        ("Deployment", 2, [["a", "b"], ["c"]]),
        ("Replica", 1, [["a-0"]]),
        ("Worker", 1, [["w0"], ["w1"], ["w2"]]),
        ("Worker", 3, [["w0", "w1", "w2"]]),
        ("Gateway", 1, [["g0"], ["g1"]]),
    ],
)
async def test_every_list_has_pages_in_the_order_of_names(
    populated: Controller, kind: str, size: int, pages: list[list[str]]
) -> None:
    assert await listed(populated, kind, page_size=size) == pages


@pytest.mark.parametrize(
    ("kind", "filter", "names"),
    [
        ("Deployment", 'spec.name = "b"', ["b"]),
        ("Deployment", 'spec.model = "/models/c"', ["c"]),
        ("Deployment", 'state = "DEPLOYMENT_STATE_PENDING"', ["b", "c"]),
        ("Replica", 'replica = "a-0" AND deployment = "a" AND state = "REPLICA_STATE_FORMING"', ["a-0"]),
        ("Replica", 'deployment = "b"', []),
        ("Worker", 'worker = "w1"', ["w1"]),
        ("Worker", 'host = "host" AND device = "cpu" AND state = "WORKER_STATE_FREE"', ["w2"]),
        ("Worker", 'deployment = "a" AND replica = "a-0"', ["w0", "w1"]),
        ("Worker", 'replica = ""', ["w2"]),
        ("Gateway", 'gateway = "g1"', ["g1"]),
        ("Gateway", 'host = "host-g0"', ["g0"]),
    ],
)
async def test_every_documented_field_can_be_filtered_by(
    populated: Controller, kind: str, filter: str, names: list[str]
) -> None:
    assert await listed(populated, kind, filter=filter) == [names]


@pytest.mark.parametrize("kind", list(NAME_FIELDS))
async def test_every_list_refuses_bad_pages_and_filters(controller: Controller, kind: str) -> None:
    for options, says in (
        ({"page_size": -1}, "page_size"),
        ({"page_token": "x"}, "page_token"),
        ({"filter": 'revision = "1"'}, "revision is not a field to filter by"),
    ):
        error = await refusal(listed(controller, kind, **options))
        assert error.reason == "INVALID_ARGUMENT"
        assert says in error.message


@pytest.mark.parametrize(
    ("kind", "name"), [("Deployment", "a"), ("Replica", "a-0"), ("Worker", "w1"), ("Gateway", "g0")]
)
async def test_every_kind_has_a_get(populated: Controller, kind: str, name: str) -> None:
    get = getattr(populated.stub, f"Get{kind}")
    request = getattr(control_pb2, f"Get{kind}Request")
    response = await get(request(name=name), timeout=10)
    assert name_of(kind, getattr(response, kind.lower())) == name
    error = await refusal(get(request(name="nobody"), timeout=10))
    assert (error.reason, error.code) == (f"UNKNOWN_{kind.upper()}", grpc.StatusCode.NOT_FOUND)
    assert error.message == f"there is no {kind.lower()} 'nobody'"
