"""What `phalanx up` makes of its options."""

from __future__ import annotations

from pathlib import Path

import pytest

from phalanx.cli.failure import Failure
from phalanx.cli.up import deployment_name


def test_a_deployment_is_named_after_its_directory():
    assert deployment_name(Path("/models/Llama 3.2_1B")) == "llama-3.2-1b"
    with pytest.raises(Failure):
        deployment_name(Path("/___"))
