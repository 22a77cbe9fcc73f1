from __future__ import annotations

from dataclasses import replace

import pytest

from controlplane.etag import check_etag, etag_of
from phalanx.runtime.errors import PhalanxError
from phalanx.store.records import DeploymentRecord, LayoutRecord, decode, encode

RECORD = DeploymentRecord("a", 3, "/models/one", created_at=1_700_000_000.25)


def test_an_etag_outlives_the_store_and_is_weak() -> None:
    assert etag_of(decode(DeploymentRecord, encode(RECORD))) == etag_of(RECORD)
    assert etag_of(RECORD).startswith('W/"')


@pytest.mark.parametrize(
    "change",
    [
        {"revision": 4},
        {"created_at": 1_700_000_000.5},  # deleted and created again
        {"replicas": 2},
        {"fallbacks": (LayoutRecord(1, 1),)},
    ],
)
def test_every_change_has_an_etag_of_its_own(change: dict[str, object]) -> None:
    changed = replace(RECORD, **change)  # type: ignore[arg-type]
    assert etag_of(changed) != etag_of(RECORD)
    with pytest.raises(PhalanxError) as caught:
        check_etag("a", changed, etag_of(RECORD))
    assert (caught.value.reason, caught.value.retryable) == ("ETAG_MISMATCH", False)
    assert "Read it again" in caught.value.message
    assert f"revision {changed.revision}" in caught.value.message


def test_the_message_quotes_an_etag_whatever_is_in_it() -> None:
    with pytest.raises(PhalanxError) as caught:
        check_etag("a", RECORD, "x\ny")
    assert r"'x\ny'" in caught.value.message


def test_an_etag_of_what_is_gone_does_not_fit() -> None:
    with pytest.raises(PhalanxError, match="without an etag"):
        check_etag("a", None, etag_of(RECORD))


def test_no_etag_fits_everything() -> None:
    check_etag("a", RECORD, "")
    check_etag("a", None, "")


def test_its_own_etag_fits() -> None:
    check_etag("a", RECORD, etag_of(RECORD))
