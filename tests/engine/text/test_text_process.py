"""The text process over a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.ipc.wire import (
    Encode,
    Encoded,
    EngineFailed,
    Forget,
    NotEncoded,
    StartText,
    Step,
    TextReady,
    Track,
)
from engine.request import Delta, Load, PositionLogprobs, TokenLogprob
from engine.text.process import TextService
from tests.engine.child import Child, child
from tests.engine.conftest import END


@pytest.fixture(scope="module")
def text(model_dir: Path) -> Iterator[Child]:
    with child("engine.text.process") as process:
        process.send(StartText(str(model_dir)))
        ready = process.expect(TextReady)
        assert len(END) <= ready.longest_token_bytes < 100
        yield process


def encode(text: Child, words: str) -> tuple[int, ...]:
    text.send(Encode("e", text=words))
    return text.expect(Encoded).token_ids


def test_without_a_tokeniser_only_ids_are_served(tmp_path: Path) -> None:
    """Where the model may do without: one of random weights."""
    with child("engine.text.process") as process:
        process.send(StartText(str(tmp_path), ids_only=True))
        assert process.expect(TextReady).longest_token_bytes == 0
        process.send(Encode("e", text="words"))
        assert process.expect(NotEncoded).refusal.reason == "NO_TOKENIZER"
        process.send(Encode("c", messages=(("user", "words"),)))
        assert process.expect(NotEncoded).refusal.reason == "NO_TOKENIZER"
        process.send(Track("a", 1))
        (delta,) = feed(process, Delta("a", 0, 0, (5, 6), finish="length"))
        assert (delta.token_ids, delta.pieces) == ((5, 6), ("", ""))
    with child("engine.text.process") as process:
        process.send(StartText(str(tmp_path)))
        assert process.expect(EngineFailed).reason == "INVALID_MODEL"


def feed(text: Child, *deltas: Delta) -> tuple[Delta, ...]:
    text.send(Step(4, Load(1, 2, 3, 4), accepted=("x",), deltas=deltas))
    step = text.expect(Step)
    assert (step.step, step.load, step.accepted) == (4, Load(1, 2, 3, 4), ("x",))
    return step.deltas


def test_pieces_make_up_the_text_even_across_characters(text: Child) -> None:
    words = "the shield 🙂 ждёт falls"
    ids = encode(text, words)
    text.send(Track("a", 1))
    pieces = [feed(text, Delta("a", 0, i, (token,)))[0].pieces for i, token in enumerate(ids)]
    assert all(len(piece) == 1 for piece in pieces)
    assert "".join(piece for (piece,) in pieces) == words
    text.send(Forget("a"))


def test_a_conversation_goes_through_the_chat_template(text: Child) -> None:
    text.send(Encode("c", messages=(("user", "when"), ("assistant", "again"))))
    chat = text.expect(Encoded)
    assert chat.token_ids == encode(text, "user: when\nassistant: again\nassistant:")


def test_bad_words_are_spelled_alone_and_after_a_space(text: Child) -> None:
    text.send(Encode("b", text="when", bad_words=(" wall", "zq")))
    encoded = text.expect(Encoded)
    assert encoded.token_ids == encode(text, "when")
    assert set(encoded.bad_words) >= {encode(text, "wall"), encode(text, "zq")}
    assert encode(text, " wall") in encoded.bad_words or len(encode(text, " wall")) != len(
        encode(text, "wall")
    )
    text.send(Encode("b", bad_words=("zq",)))
    assert text.expect(Encoded) == Encoded("b", (), (encode(text, "zq"),))


def test_a_stop_text_before_the_least_tokens_is_text(text: Child) -> None:
    ids = encode(text, "ab ab")
    text.send(Track("m", 1, stop=("b",), min_tokens=3))
    (delta,) = feed(text, Delta("m", 0, 0, ids))
    assert ("".join(delta.pieces), delta.finish) == ("ab a", "stop")
    text.send(Forget("m"))


def test_a_stop_text_cuts_the_delta_and_finishes(text: Child) -> None:
    ids = encode(text, "the wall stands again")
    text.send(Track("a", 2, stop=("wall st",)))
    (cut,) = feed(text, Delta("a", 1, 0, ids))
    assert cut.finish == "stop"
    assert "".join(cut.pieces) == "the "
    assert cut.token_ids == ids[: len(cut.pieces)]
    (dropped,) = feed(text, Delta("a", 1, len(ids), (3, 4), finish="length"))
    assert (dropped.token_ids, dropped.pieces, dropped.finish) == ((), (), None)
    (other,) = feed(text, Delta("a", 0, 0, ids[:1]))
    assert other.finish is None
    text.send(Forget("a"))


def test_a_stop_text_is_found_across_a_replay(text: Child) -> None:
    ids = encode(text, "the wall stands again")
    text.send(Track("whole", 1, stop=("stands a",)))
    (whole,) = feed(text, Delta("whole", 0, 0, ids))
    for at in range(len(whole.token_ids)):
        text.send(Track("again", 1, prior=(ids[:at],), stop=("stands a",)))
        (rest,) = feed(text, Delta("again", 0, at, ids[at:]))
        assert rest.pieces == whole.pieces[at:]
        assert rest.finish == "stop"
        text.send(Forget("again"))
    text.send(Forget("whole"))


def test_held_back_text_comes_with_the_last_token(text: Child) -> None:
    ids = encode(text, "the wall")
    text.send(Track("a", 1, stop=("wall!",)))
    (delta,) = feed(text, Delta("a", 0, 0, ids, finish="length"))
    assert "".join(delta.pieces) == "the wall"
    assert delta.finish == "length"
    text.send(Forget("a"))


def test_a_choice_that_ends_without_a_token_brings_no_text(text: Child) -> None:
    ids = encode(text, "the wall")
    text.send(Track("a", 1, prior=(ids,), stop=("wall!",)))
    last = Delta("a", 0, len(ids), (), finish="length")
    assert feed(text, last) == (last,)
    text.send(Forget("a"))


def test_a_prompt_that_is_too_long_is_refused_and_not_sent_back(text: Child) -> None:
    ids = encode(text, "the wall stands again")
    text.send(Encode("e", text="the wall stands again", max_model_len=len(ids) + 1))
    assert text.expect(Encoded).token_ids == ids
    text.send(Encode("e", text="the wall stands again", max_model_len=len(ids)))
    refusal = text.expect(NotEncoded).refusal
    assert (refusal.id, refusal.reason) == ("e", "PROMPT_TOO_LONG")
    limit = len(ids)
    assert refusal.message == (
        f"the prompt has {limit} tokens; prompt and output together have at most {limit}"
    )


def test_special_tokens_are_no_text(text: Child) -> None:
    (end,) = encode(text, END)
    text.send(Track("a", 1))
    (delta,) = feed(text, Delta("a", 0, 0, (*encode(text, "falls"), end), finish="stop"))
    assert "".join(delta.pieces) == "falls"
    text.send(Forget("a"))


def test_logprobs_get_their_texts(text: Child) -> None:
    (end,) = encode(text, END)
    token = encode(text, "x")[0]
    logprobs = PositionLogprobs(TokenLogprob(token, -1.0), (TokenLogprob(end, -2.0),))
    text.send(Track("a", 1))
    (delta,) = feed(text, Delta("a", 0, 0, (token,), logprobs=(logprobs,)))
    assert delta.logprobs[0].chosen == TokenLogprob(token, -1.0, "x")
    assert delta.logprobs[0].top == (TokenLogprob(end, -2.0, END),)
    text.send(Forget("a"))


def test_deltas_of_untracked_requests_pass_through(text: Child) -> None:
    delta = Delta("unknown", 0, 0, (1, 2))
    assert feed(text, delta) == (delta,)


def test_a_model_without_chat_template_refuses_conversations(model_dir: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    with child("engine.text.process") as process:
        process.send(StartText(str(tmp_path)), Encode("c", messages=(("user", "when"),)))
        refusal = process.expect(NotEncoded).refusal
        assert (refusal.id, refusal.reason) == ("c", "NO_CHAT_TEMPLATE")
        process.link.close()
        assert process.process.wait(20) == 0


@pytest.mark.parametrize(
    ("template", "explanation"),
    [
        ("{{ messages[0].content + 1 }}", "TypeError: "),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nothing.at_all }}", "nothing"),
    ],
)
def test_a_chat_template_that_fails_fails_one_request(
    model_dir: Path, tmp_path: Path, template: str, explanation: str
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template)
    with child("engine.text.process") as process:
        process.send(StartText(str(tmp_path)), Encode("c", messages=(("user", "a secret"),)))
        refusal = process.expect(NotEncoded).refusal
        assert (refusal.id, refusal.reason) == ("c", "INVALID_ARGUMENT")
        assert explanation in refusal.message
        assert "secret" not in refusal.message
        process.send(Encode("next", text="the wall"))
        assert process.expect(Encoded).id == "next"


class Panic(BaseException):
    """As those of extensions in Rust: no Exception."""


@pytest.mark.parametrize("error", [ValueError("x" * 5000), Panic("index out of bounds")])
def test_a_tokeniser_that_fails_fails_one_request(error: BaseException) -> None:
    class Failing:
        def encode(self, text: str) -> tuple[int, ...]:
            raise error

    service = TextService(Failing())  # type: ignore[arg-type]  # all of a tokeniser that it calls
    answer = service.handle(Encode("e", text="a secret"))
    assert isinstance(answer, NotEncoded)
    assert (answer.refusal.id, answer.refusal.reason) == ("e", "INVALID_ARGUMENT")
    assert f"{type(error).__name__}: {error}"[:100] in answer.refusal.message
    assert len(answer.refusal.message) < 300


def test_a_directory_without_tokeniser_is_a_permanent_failure(tmp_path: Path) -> None:
    with child("engine.text.process") as process:
        process.send(StartText(str(tmp_path)))
        failed = process.expect(EngineFailed)
        assert (failed.reason, failed.permanent) == ("INVALID_MODEL", True)
