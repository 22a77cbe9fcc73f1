"""`reconcile` under random events: its invariants, and its convergence once faults stop."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from controlplane.decisions.actions import FormReplica
from controlplane.decisions.desired import desired_replicas
from controlplane.decisions.health import ReplicaState, health
from controlplane.decisions.reconcile import reconcile
from controlplane.decisions.shapes import same_shape
from engine.weights.layouts import smaller_sizes
from phalanx.store.interface import Listing
from phalanx.store.records import LayoutRecord, ShardState
from phalanx.store.snapshot import Snapshot
from tests.unit.controlplane.world import World

WORKERS = [f"w{index}" for index in range(7)]
DEPLOYMENTS = ["a", "b", "c"]
index = st.integers(0, 20)


class Reconciling(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.old_views: list[Listing] = []

    @rule(worker=st.sampled_from(WORKERS), draining=st.sampled_from([False, False, False, True]))
    def boots(self, worker: str, draining: bool) -> None:
        """A new worker boots, or a worker boots again before its lease has ended."""
        self.world.boot(worker, host=f"host-{int(worker[1:]) // 3}", draining=draining)

    @rule(worker=st.sampled_from(WORKERS))
    def dies(self, worker: str) -> None:
        self.world.die(worker)

    @rule(
        name=st.sampled_from(DEPLOYMENTS),
        replicas=st.integers(1, 3),
        tp=st.sampled_from([1, 1, 2]),
        pp=st.sampled_from([1, 1, 2]),
        model=st.sampled_from(["/one", "/two"]),
        fixed=st.booleans(),
    )
    def applies(self, name: str, replicas: int, tp: int, pp: int, model: str, fixed: bool) -> None:
        fallbacks = () if fixed else tuple(LayoutRecord(*size) for size in smaller_sizes(tp, pp))
        self.world.apply(name, replicas, tp, pp, model, fallbacks)

    @rule(name=st.sampled_from(DEPLOYMENTS))
    def deletes(self, name: str) -> None:
        self.world.delete(name)

    @precondition(lambda self: self.world.snapshot.replicas)
    @rule(which=index, state=st.sampled_from(ShardState), permanent=st.booleans(), ranks=st.booleans())
    def reports(self, which: int, state: ShardState, permanent: bool, ranks: bool) -> None:
        names = sorted(self.world.snapshot.replicas)
        replica = names[which % len(names)]
        one = [which % len(self.world.members(replica))] if ranks else []
        self.world.report(replica, state, *one, reason="reason", permanent=permanent)

    @rule(seconds=st.sampled_from([0.5, 3.0, 31.0, -5.0]))
    def passes(self, seconds: float) -> None:
        self.world.now += seconds

    @rule()
    def looks(self) -> None:
        self.old_views.append(self.world.listing)

    @precondition(lambda self: self.old_views)
    @rule(which=index)
    def acts_on_an_old_view(self, which: int) -> None:
        self.world.reconcile(self.old_views[which % len(self.old_views)])

    @rule()
    def reconciles(self) -> None:
        before = self.world.snapshot
        decision, written = self.world.reconcile()
        assert written
        self._check_members(
            [action for action in decision.actions if isinstance(action, FormReplica)], before
        )
        self._check_taken_down(
            [action for action in decision.actions if isinstance(action, FormReplica)], before
        )
        again = reconcile(self.world.snapshot, self.world.now, decision.history)
        assert again.actions == ()

    @invariant()
    def no_worker_is_a_member_twice(self) -> None:
        members = Counter(
            member.worker
            for assigned in self.world.snapshot.replicas.values()
            for member in assigned.assignment.members
        )
        assert all(count == 1 for count in members.values())

    def teardown(self) -> None:
        """Faults stop: every replica becomes ready, or too few workers are left for it."""
        for _ in range(100):
            decision, _ = self.world.reconcile()
            for replica in self.world.snapshot.replicas:
                if health(self.world.snapshot, replica).state is ReplicaState.FORMING:
                    self.world.ready(replica)
            if decision.wake_at is not None:
                self.world.now = max(self.world.now, decision.wake_at)
                continue
            again = reconcile(self.world.snapshot, self.world.now, decision.history)
            if not again.actions and again.wake_at is None:
                break
        snapshot = self.world.snapshot
        decision = reconcile(snapshot, self.world.now, self.world.history)
        assert decision.actions == ()
        assert decision.wake_at is None
        assert decision.retries == {}
        assert set(snapshot.replicas) <= set(desired_replicas(snapshot))
        self._check_shortages(snapshot, set(decision.shortages))

    def _check_members(self, forms: list[FormReplica], before: Snapshot) -> None:
        for form in forms:
            assert len(form.assignment.members) == form.assignment.deployment.shards
            for member in form.assignment.members:
                worker = before.workers[member.worker]
                assert (worker.incarnation, worker.draining) == (member.incarnation, False)

    def _check_taken_down(self, forms: list[FormReplica], before: Snapshot) -> None:
        """A deployment re-forms at most one serving replica at a time, and only while all new ones serve."""
        serving = [
            form
            for form in forms
            if form.epoch and health(before, form.assignment.replica).state is ReplicaState.READY
        ]
        names = [form.assignment.deployment.name for form in serving]
        assert len(set(names)) == len(names)
        for form in serving:
            for replica, assigned in before.replicas.items():
                same = same_shape(assigned.assignment.deployment, form.assignment.deployment)
                if same and assigned.assignment.deployment.name == form.assignment.deployment.name:
                    assert (
                        replica not in desired_replicas(before)
                        or health(before, replica).state is ReplicaState.READY
                    )

    def _check_shortages(self, snapshot: Snapshot, lacking: set[str]) -> None:
        healthy = {name for name in snapshot.replicas if health(snapshot, name).state is ReplicaState.READY}
        used = {member.worker for name in healthy for member in snapshot.replicas[name].assignment.members}
        free = [
            worker.worker
            for worker in snapshot.workers.values()
            if worker.worker not in used and not worker.draining
        ]
        for name, deployment in desired_replicas(snapshot).items():
            shape_is_right = name in healthy and same_shape(
                snapshot.replicas[name].assignment.deployment, deployment
            )
            assert shape_is_right != (name in lacking), name
            if name not in healthy:
                assert len(free) < deployment.shards
                had_served = name in snapshot.replicas and name in snapshot.ready
                assert not (had_served and deployment.fallbacks and free), "it could be degraded"


Reconciling.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestReconciling = Reconciling.TestCase
