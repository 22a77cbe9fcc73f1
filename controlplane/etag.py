"""Entity tags of deployments, as https://google.aip.dev/154 describes them. Pure."""

from __future__ import annotations

import hashlib

from phalanx.runtime.errors import PhalanxError
from phalanx.store.records import DeploymentRecord, encode

_DIGEST_BYTES = 12


def etag_of(record: DeploymentRecord) -> str:
    """The entity tag of a deployment: a weak one, since it leaves out the fields that the cluster sets.

    The tag depends on the revision and on the time of creation, so no two versions have the same tag, not
    even when the deployment is deleted and created again.
    """
    return f'W/"{hashlib.blake2b(encode(record), digest_size=_DIGEST_BYTES).hexdigest()}"'


def check_etag(name: str, stored: DeploymentRecord | None, etag: str) -> None:
    """Check that a request's etag is that of the stored deployment. An empty etag is not checked.

    Raises:
        PhalanxError: ETAG_MISMATCH.
    """
    if not etag:
        return
    if stored is None:
        raise PhalanxError(
            "ETAG_MISMATCH",
            f"deployment {name!r} has no etag now: it was deleted, or its record cannot be read; "
            "send the request without an etag if that does not matter",
            param="etag",
        )
    if etag_of(stored) != etag:
        raise PhalanxError(
            "ETAG_MISMATCH",
            f"deployment {name!r} has changed since its etag was {etag!r}; "
            f"at revision {stored.revision} now. "
            "Read it again, check that your request still fits, and send the request with the new etag",
            param="etag",
        )
