"""Writes of deployments: apply and delete, with etags and validate_only."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from google.protobuf.message import DecodeError

from controlplane.etag import check_etag
from controlplane.validation import check_model, check_spec
from controlplane.view import View
from phalanx.runtime.errors import PhalanxError
from phalanx.store.interface import Delete, Entry, Modified, Put, Store
from phalanx.store.keys import Keys
from phalanx.store.records import DeploymentRecord, LayoutRecord, decode, encode
from phalanx.v1 import control_pb2


class Deployments:
    """The deployments in the store, as ControlService changes them.

    Owns: nothing; the state is in the store. A method returns once the view includes its write, so that the
    next read shows it.
    """

    def __init__(self, store: Store, keys: Keys, view: View, clock: Callable[[], float]) -> None:
        self._store = store
        self._keys = keys
        self._view = view
        self._clock = clock

    async def apply(
        self, spec: control_pb2.DeploymentSpec, etag: str, *, validate_only: bool
    ) -> tuple[DeploymentRecord, bool]:
        """Create the deployment or change its spec; returns it, and whether it changed.

        Args:
            spec: The desired shape.
            etag: The etag that the stored deployment must have; empty skips this check.
            validate_only: Check everything and write nothing.

        Raises:
            PhalanxError: the spec or the model is refused, or ETAG_MISMATCH.
            StoreUnavailableError: the store does not answer.
        """
        check_spec(spec)
        smaller = await asyncio.to_thread(
            check_model, spec.model, spec.tp or 1, spec.pp or 1, spec.load_format
        )
        fallbacks = () if spec.fixed_layout else smaller
        key = self._keys.deployment(spec.name)
        while True:
            entry = await self._store.get(key)
            old = _readable(entry)
            check_etag(spec.name, old, etag)
            new = _record(spec, fallbacks, old, self._clock())
            if validate_only or new == old:
                return new, new != old
            guard = Modified(key, entry.mod_revision if entry else 0)
            revision = await self._store.txn([guard], [Put(key, encode(new))])
            if revision is not None:
                await self._view.reached(revision)
                return new, True

    async def delete(self, name: str, etag: str, *, validate_only: bool) -> None:
        """Remove a deployment; its replicas follow.

        Raises:
            PhalanxError: UNKNOWN_DEPLOYMENT or ETAG_MISMATCH.
            StoreUnavailableError: the store does not answer.
        """
        key = self._keys.deployment(name)
        while True:
            entry = await self._store.get(key)
            if entry is None:
                raise PhalanxError("UNKNOWN_DEPLOYMENT", f"there is no deployment {name!r}")
            check_etag(name, _readable(entry), etag)
            if validate_only:
                return
            revision = await self._store.txn([Modified(key, entry.mod_revision)], [Delete(key)])
            if revision is not None:
                await self._view.reached(revision)
                return


def _readable(entry: Entry | None) -> DeploymentRecord | None:
    """The deployment in the store; an unreadable record counts as none, so that apply can replace it."""
    try:
        return decode(DeploymentRecord, entry.value) if entry else None
    except (ValueError, DecodeError):
        return None


def _record(
    spec: control_pb2.DeploymentSpec,
    fallbacks: tuple[LayoutRecord, ...],
    old: DeploymentRecord | None,
    now: float,
) -> DeploymentRecord:
    """The record for `spec`: equal to `old` when the spec is the same, else with the next revision."""
    asked = DeploymentRecord(
        name=spec.name,
        revision=old.revision if old else 1,
        model=spec.model,
        replicas=spec.replicas or 1,
        tp=spec.tp or 1,
        pp=spec.pp or 1,
        dtype=spec.dtype,
        max_model_len=spec.max_model_len,
        created_at=old.created_at if old else now,
        load_format="" if spec.load_format == "auto" else spec.load_format,
        quantization=spec.quantization,
        fixed_layout=spec.fixed_layout,
        fallbacks=fallbacks,
    )
    return asked if old is None or asked == old else replace(asked, revision=old.revision + 1)
