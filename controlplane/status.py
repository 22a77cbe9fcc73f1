"""The cluster as operators see it: from a snapshot to the messages of the control API. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from controlplane.decisions.cycle import History
from controlplane.decisions.desired import replica_name
from controlplane.decisions.health import ReplicaState, health, lost_members
from controlplane.decisions.reconcile import Decision, reconcile
from controlplane.decisions.shapes import is_degraded, same_shape
from controlplane.etag import etag_of
from phalanx.runtime.enums import word
from phalanx.runtime.times import timestamp
from phalanx.store.records import AssignmentRecord, DeploymentRecord, ShardRecord, ShardState
from phalanx.store.snapshot import Snapshot
from phalanx.v1 import control_pb2

_REPLICA_STATES = {
    ReplicaState.FORMING: control_pb2.REPLICA_STATE_FORMING,
    ReplicaState.READY: control_pb2.REPLICA_STATE_READY,
    ReplicaState.FAILED: control_pb2.REPLICA_STATE_FAILED,
}
_SHARD_STATES = {
    ShardState.STARTING: control_pb2.SHARD_STATE_STARTING,
    ShardState.READY: control_pb2.SHARD_STATE_READY,
    ShardState.FAILED: control_pb2.SHARD_STATE_FAILED,
}
# The state of a worker is that of its shard, unless the worker is free or draining.
_WORKER_STATES = {
    control_pb2.SHARD_STATE_ASSIGNED: control_pb2.WORKER_STATE_ASSIGNED,
    control_pb2.SHARD_STATE_STARTING: control_pb2.WORKER_STATE_STARTING,
    control_pb2.SHARD_STATE_READY: control_pb2.WORKER_STATE_READY,
    control_pb2.SHARD_STATE_FAILED: control_pb2.WORKER_STATE_FAILED,
}


@dataclass(frozen=True, slots=True)
class Views:
    """Every message by its name, in the order of names."""

    deployments: dict[str, control_pb2.Deployment]
    replicas: dict[str, control_pb2.Replica]
    workers: dict[str, control_pb2.Worker]
    gateways: dict[str, control_pb2.Gateway]


def views(snapshot: Snapshot, now: float) -> Views:
    """A message for everything in the snapshot; `now` is in seconds since the Unix epoch."""
    # A suspicion since time 0 has expired. So this decision names lost workers at once, while the active
    # controller still gives them `SUSPECT_S` to register again.
    decision = reconcile(snapshot, now, History(suspect_since=dict.fromkeys(snapshot.replicas, 0.0)))
    replicas = {name: _replica(snapshot, name, decision, now) for name in sorted(snapshot.replicas)}
    return Views(
        {
            name: _deployment(snapshot, snapshot.deployments[name], replicas, decision)
            for name in sorted(snapshot.deployments)
        },
        replicas,
        _workers(snapshot),
        {name: _gateway(snapshot, name) for name in sorted(snapshot.gateways)},
    )


def _deployment(
    snapshot: Snapshot,
    deployment: DeploymentRecord,
    replicas: dict[str, control_pb2.Replica],
    decision: Decision,
) -> control_pb2.Deployment:
    names = [replica_name(deployment.name, index) for index in range(deployment.replicas)]
    state, reason = _deployment_state(snapshot, deployment, names, replicas, decision)
    return control_pb2.Deployment(
        spec=control_pb2.DeploymentSpec(
            name=deployment.name,
            model=deployment.model,
            replicas=deployment.replicas,
            tp=deployment.tp,
            pp=deployment.pp,
            dtype=deployment.dtype,
            max_model_len=deployment.max_model_len,
            load_format=deployment.load_format,
            quantization=deployment.quantization,
            fixed_layout=deployment.fixed_layout,
        ),
        revision=deployment.revision,
        state=state,
        reason=reason,
        ready_replicas=sum(
            1
            for name, assigned in snapshot.replicas.items()
            if assigned.assignment.deployment.name == deployment.name and _is_ready(replicas[name])
        ),
        create_time=timestamp(deployment.created_at),
        etag=etag_of(deployment),
    )


def _deployment_state(
    snapshot: Snapshot,
    deployment: DeploymentRecord,
    names: list[str],
    replicas: dict[str, control_pb2.Replica],
    decision: Decision,
) -> tuple[control_pb2.DeploymentState.ValueType, str]:
    """The worst state of the deployment's replicas, and the reasons of the replicas in that state."""
    lacking = {name: f"{name} {decision.shortages[name]}" for name in names if name in decision.shortages}
    degraded: list[str] = []
    failed: list[str] = []
    progressing: list[str] = []
    for name in names:
        assigned = snapshot.replicas.get(name)
        lost = assigned is not None and replicas[name].state == control_pb2.REPLICA_STATE_FAILED
        if assigned and not lost and is_degraded(assigned.assignment.deployment, deployment):
            why = f": {decision.shortages[name]}" if lacking.pop(name, None) else ""
            runs = f"{name} runs in tp={replicas[name].tp} x pp={replicas[name].pp}{why}"
            (degraded if _is_ready(replicas[name]) else progressing).append(runs)
        elif assigned is None:
            progressing.append(f"{name} is not formed yet")
        elif not same_shape(assigned.assignment.deployment, deployment) and not lost:
            progressing.append(f"{name} still has the shape of revision {replicas[name].revision}")
        elif not _is_ready(replicas[name]):
            reasons = failed if health(snapshot, name).permanent else progressing
            state = word(control_pb2.ReplicaState.DESCRIPTOR, replicas[name].state)
            reasons.append(f"{name} is {state}: {replicas[name].reason}")
    worst_first = {
        control_pb2.DEPLOYMENT_STATE_FAILED: failed,
        control_pb2.DEPLOYMENT_STATE_PENDING: list(lacking.values()),
        control_pb2.DEPLOYMENT_STATE_PROGRESSING: progressing,
        control_pb2.DEPLOYMENT_STATE_DEGRADED: degraded,
    }
    for number, reasons in worst_first.items():
        if reasons:
            no_controller = "; no controller is active" if snapshot.active_controller is None else ""
            return number, "; ".join(reasons) + no_controller
    return control_pb2.DEPLOYMENT_STATE_READY, ""


def _replica(snapshot: Snapshot, name: str, decision: Decision, now: float) -> control_pb2.Replica:
    assigned = snapshot.replicas[name]
    assignment = assigned.assignment
    seen = health(snapshot, name)
    shards = [_shard(snapshot, assignment, rank) for rank in range(len(assignment.members))]
    reason = seen.reason
    if seen.state is ReplicaState.FORMING:
        waiting = [
            f"{shard.rank} {word(control_pb2.ShardState.DESCRIPTOR, shard.state)}"
            for shard in shards
            if shard.state != control_pb2.SHARD_STATE_READY
        ]
        reason = f"shards: {', '.join(waiting)}"
    if name in decision.shortages:
        reason += f"; {decision.shortages[name]}"
    if name in decision.retries:
        failures = f", {assignment.failures + 1} failures in a row" if assignment.failures else ""
        reason += f"; tries again in {decision.retries[name] - now:.0f} s{failures}"
    return control_pb2.Replica(
        replica=name,
        deployment=assignment.deployment.name,
        revision=assignment.deployment.revision,
        epoch=assigned.epoch,
        state=_REPLICA_STATES[seen.state],
        reason=reason.removeprefix("; "),
        shards=shards,
        tp=assignment.deployment.tp,
        pp=assignment.deployment.pp,
    )


def _shard(snapshot: Snapshot, assignment: AssignmentRecord, rank: int) -> control_pb2.Shard:
    member, record = assignment.members[rank], snapshot.shard(assignment.replica, rank)
    lost = member.worker in lost_members(snapshot, assignment)
    return control_pb2.Shard(
        rank=rank,
        tp_rank=rank % assignment.deployment.tp,
        pp_rank=rank // assignment.deployment.tp,
        worker=member.worker,
        state=control_pb2.SHARD_STATE_LOST if lost else _shard_state(record),
        reason="its worker is gone" if lost else record.reason if record else "",
    )


def _shard_state(record: ShardRecord | None) -> control_pb2.ShardState.ValueType:
    return _SHARD_STATES[record.state] if record else control_pb2.SHARD_STATE_ASSIGNED


def _is_ready(replica: control_pb2.Replica) -> bool:
    return replica.state == control_pb2.REPLICA_STATE_READY


def _workers(snapshot: Snapshot) -> dict[str, control_pb2.Worker]:
    assigned_ranks = {
        (member.worker, member.incarnation): (name, rank)
        for name, assigned in snapshot.replicas.items()
        for rank, member in enumerate(assigned.assignment.members)
    }
    messages = {}
    for name, worker in sorted(snapshot.workers.items()):
        message = control_pb2.Worker(
            worker=worker.worker,
            incarnation=worker.incarnation,
            host=worker.host,
            device=worker.device,
            state=control_pb2.WORKER_STATE_FREE,
            server_pid=worker.server_pid,
            address=worker.address,
        )
        place = assigned_ranks.get((name, worker.incarnation))
        if place is not None:
            _add_shard(message, snapshot, *place)
        if worker.draining:
            message.state = control_pb2.WORKER_STATE_DRAINING
            message.reason = worker.ailment or message.reason
        messages[name] = message
    return messages


def _add_shard(message: control_pb2.Worker, snapshot: Snapshot, replica: str, rank: int) -> None:
    assigned, record = snapshot.replicas[replica], snapshot.shard(replica, rank)
    deployment = assigned.assignment.deployment
    message.state = _WORKER_STATES[_shard_state(record)]
    message.deployment = deployment.name
    message.replica = replica
    message.epoch = assigned.epoch
    message.tp_rank = rank % deployment.tp
    message.pp_rank = rank // deployment.tp
    if record and record.engine_pid:
        message.engine_pid = record.engine_pid
    if record and record.text_pid:
        message.text_pid = record.text_pid
    if record and record.reason:
        message.reason = record.reason


def _gateway(snapshot: Snapshot, name: str) -> control_pb2.Gateway:
    gateway = snapshot.gateways[name]
    return control_pb2.Gateway(
        gateway=gateway.gateway,
        incarnation=gateway.incarnation,
        host=gateway.host,
        grpc_address=gateway.grpc_address,
        http_url=gateway.http_url,
        pid=gateway.pid,
    )
