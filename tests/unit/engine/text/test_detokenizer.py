from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.text.detokenizer import ChoiceText, Detokenizer, StopCutter


def decode(token_ids: list[int]) -> str:
    """A byte per token; 256 is a special token without text."""
    return bytes(token for token in token_ids if token < 256).decode(errors="replace")


def choice(*stop: str, min_tokens: int = 0) -> ChoiceText:
    return ChoiceText(Detokenizer(decode), stop, min_tokens)


def pieces(text: ChoiceText, tokens: list[int]) -> list[str]:
    """The piece of each token up to the one that completes a stop text; the last takes the rest."""
    result: list[str] = []
    for token in tokens:
        result.append(text.push(token))
        if text.stopped:
            return result
    if result:
        result[-1] += text.flush()
    return result


@given(st.text(max_size=30), st.sets(st.integers(0, 30)))
def test_pieces_make_up_the_text(text: str, special_at: set[int]) -> None:
    tokens: list[int] = []
    for at, byte in enumerate(text.encode(errors="replace")):
        tokens += [256, byte] if at in special_at else [byte]
    assert "".join(pieces(choice(), tokens)) == decode(tokens)


@given(st.lists(st.integers(0, 256), max_size=12))
def test_pieces_of_broken_bytes_make_up_the_text(tokens: list[int]) -> None:
    assert "".join(pieces(choice(), tokens)) == decode(tokens)


def test_a_character_comes_whole_with_its_last_byte() -> None:
    detokenizer = Detokenizer(decode)
    assert [detokenizer.push(byte) for byte in "a🙂b".encode()] == ["a", "", "", "", "🙂", "b"]


def test_bytes_that_never_become_a_character_are_not_held_for_ever() -> None:
    detokenizer = Detokenizer(decode)
    out = "".join(detokenizer.push(0xFF) for _ in range(40))
    assert len(out) > 20
    assert set(out) == {"\N{REPLACEMENT CHARACTER}"}


def test_the_token_before_the_first_keeps_a_leading_space() -> None:
    def stripping(token_ids: list[int]) -> str:
        return decode(token_ids).removeprefix(" ")

    assert Detokenizer(stripping, [ord("a")]).push(ord(" ")) == " "


@given(
    st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.integers(1, 4)
)
def test_text_ends_before_the_first_stop_text_to_be_completed(text: str, stop: list[str], size: int) -> None:
    cutter = StopCutter(stop)
    shown, stopped = "", False
    for start in range(0, len(text), size):
        part, stopped = cutter.push(text[start : start + size])
        shown += part
        if stopped:
            break
    if not stopped:
        shown += cutter.flush()
    # Looked at a part at a time, the first part to complete a stop text decides.
    seen = next(
        (
            text[: end + size]
            for end in range(0, len(text), size)
            if any(s in text[: end + size] for s in stop)
        ),
        None,
    )
    if seen is None:
        assert (shown, stopped) == (text, False)
    else:
        assert (shown, stopped) == (seen[: min(seen.find(s) for s in stop if s in seen)], True)


def test_text_that_may_become_a_stop_text_is_held_back() -> None:
    text = choice("STOP")
    assert [text.push(byte) for byte in b"aST"] == ["a", "", ""]
    assert text.push(ord("x")) == "STx"
    assert not text.stopped


def test_a_stop_text_across_tokens_is_never_shown() -> None:
    text = choice("STOP")
    assert pieces(text, list(b"aSTOPb")) == ["a", "", "", "", ""]
    assert text.stopped


def test_held_back_text_comes_with_the_last_token() -> None:
    assert pieces(choice("STOP"), list(b"aST")) == ["a", "", "ST"]


def test_a_stop_text_is_found_in_bytes_that_only_the_end_released() -> None:
    text = choice("\N{REPLACEMENT CHARACTER}")
    assert pieces(text, [ord("a"), 0xF0]) == ["a", ""]
    assert text.stopped


@given(st.text("ab", min_size=1, max_size=12), st.text("ab", min_size=1, max_size=3), st.integers(0, 12))
def test_stop_texts_count_from_where_they_end_after_the_least_tokens(
    text: str, stop: str, min_tokens: int
) -> None:
    ends = (end for end in range(min_tokens + 1, len(text) + 1) if text[:end].endswith(stop))
    end = next(ends, None)
    got = choice(stop, min_tokens=min_tokens)
    shown = "".join(pieces(got, list(text.encode())))
    assert (shown, got.stopped) == ((text, False) if end is None else (text[: end - len(stop)], True))


def test_a_stop_text_that_only_the_last_token_releases_may_come_too_early() -> None:
    assert pieces(choice("\N{REPLACEMENT CHARACTER}", min_tokens=2), [ord("a"), 0xF0]) == [
        "a",
        "\N{REPLACEMENT CHARACTER}",
    ]
