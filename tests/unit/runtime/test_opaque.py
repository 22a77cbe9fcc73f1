from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.runtime import opaque


@given(st.binary(max_size=64))
def test_content_survives(content: bytes) -> None:
    assert opaque.decode(opaque.encode(content)) == content


@given(st.text(max_size=32))
def test_a_text_is_one_that_encode_makes_or_refused(text: str) -> None:
    try:
        content = opaque.decode(text)
    except ValueError:
        return
    assert opaque.encode(content) == text


@pytest.mark.parametrize("text", ["A", "AB", "AA==", "AA\n", "A A", "++", "//", "\u0410\u0410"])
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # each has a message of its own
        opaque.decode(text)
