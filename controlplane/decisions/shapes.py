"""Comparison of the shape that a replica runs with the shape that its deployment asks for. Pure."""

from __future__ import annotations

from dataclasses import replace

from phalanx.store.records import DeploymentRecord


def same_shape(one: DeploymentRecord, other: DeploymentRecord) -> bool:
    """Whether a replica that was formed for one of them serves the other.

    Fields that do not reach the engine may differ.
    """
    return (
        replace(
            other,
            replicas=one.replicas,
            revision=one.revision,
            created_at=one.created_at,
            fixed_layout=one.fixed_layout,
            fallbacks=one.fallbacks,
        )
        == one
    )


def smaller_shapes(deployment: DeploymentRecord) -> list[DeploymentRecord]:
    """The deployment in each smaller layout that its replicas may run in, best first."""
    return [replace(deployment, tp=layout.tp, pp=layout.pp) for layout in deployment.fallbacks]


def is_degraded(runs: DeploymentRecord, desired: DeploymentRecord) -> bool:
    """Whether a replica that runs `runs` has the desired revision and a smaller layout than desired."""
    return runs.revision == desired.revision and any(
        same_shape(runs, smaller) for smaller in smaller_shapes(desired)
    )
