from __future__ import annotations

from pathlib import Path

import pytest

from phalanx.cli.apply import parse
from phalanx.cli.failure import USAGE, Failure


def test_reads_every_document():
    specs = parse("name: a\nmodel: /m\nreplicas: 2\n---\nname: b\nmodel: /n\ntp: 4\n", Path("/"))
    assert [(spec.name, spec.model, spec.replicas, spec.tp) for spec in specs] == [
        ("a", "/m", 2, 0),
        ("b", "/n", 0, 4),
    ]
    assert not specs[0].HasField("tp")


def test_a_relative_model_is_beside_the_file():
    (spec,) = parse("name: a\nmodel: models/a", Path("/srv"))
    assert spec.model == "/srv/models/a"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no deployment"),
        ("- a", "at least `name` and `model`"),
        ("name: a", "at least `name` and `model`"),
        ("name: a\nmodel: /m\nreplica: 2", "no field replica"),
        ("name: a\nmodel: /m\nreplicas: many", "deployment a"),
        ("name: a\nmodel: /m\nreplicas: -1", "deployment a"),
        ("{", "not YAML"),
    ],
)
def test_says_what_is_wrong_with_a_file(text: str, says: str):
    with pytest.raises(Failure, match=says) as failure:
        parse(text, Path("/"))
    assert failure.value.exit_code == USAGE
