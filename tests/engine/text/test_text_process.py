"""The text of requests with a real tokeniser, in this process and as a process of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.ipc import wire
from engine.ipc.link import Link, LinkClosedError
from engine.ipc.wire import (
    Encode,
    Encoded,
    EngineFailed,
    Forget,
    NotEncoded,
    StartText,
    Step,
    TextReady,
)
from engine.request import Delta, Load, PositionLogprobs, Refusal, TokenLogprob
from engine.text import encoder
from engine.text.encoder import Encoder
from engine.text.process import EngineStreams, serve
from engine.text.service import TextService
from engine.text.tokenizer import IdsOnly, Tokenizer, tokenizer_of
from tests.engine.child import Child
from tests.engine.conftest import END


def step_of(*deltas: Delta) -> Step:
    return Step(4, Load(1, 2, 3, 4), accepted=("x",), deltas=deltas)


class Text(TextService):
    """A service in this process that tokenises in the caller's thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__(tokenizer, lambda answer: None)

    def encode(self, message: Encode) -> Encoded | NotEncoded:
        return encoder.encode(self._tokenizer, message)

    def ids(self, words: str) -> tuple[int, ...]:
        return self._tokenizer.encode(words)

    def feed(self, *deltas: Delta) -> tuple[Delta, ...]:
        step = self.fill(step_of(*deltas))
        assert (step.step, step.load, step.accepted) == (4, Load(1, 2, 3, 4), ("x",))
        return step.deltas


@pytest.fixture(scope="module")
def text(model_dir: Path) -> Text:
    return Text(Tokenizer(str(model_dir)))


def without_template(model_dir: Path, directory: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((model_dir / name).read_bytes())
    return directory


def test_pieces_make_up_the_text_even_across_characters(text: Text) -> None:
    words = "the shield 🙂 ждёт falls"
    ids = text.ids(words)
    text.handle(Encode("a", n=1))
    pieces = [text.feed(Delta("a", 0, i, (token,)))[0].pieces for i, token in enumerate(ids)]
    assert all(len(piece) == 1 for piece in pieces)
    assert "".join(piece for (piece,) in pieces) == words
    text.handle(Forget("a"))


def test_a_conversation_goes_through_the_chat_template(text: Text) -> None:
    chat = text.encode(Encode("c", messages=(("user", "when"), ("assistant", "again"))))
    assert isinstance(chat, Encoded)
    assert chat.token_ids == text.ids("user: when\nassistant: again\nassistant:")


def test_bad_words_are_spelled_alone_and_after_a_space_where_that_is_as_short(text: Text) -> None:
    answer = text.encode(Encode("b", text="when", bad_words=(" wall", "zq", "a")))
    assert isinstance(answer, Encoded)
    assert answer.token_ids == text.ids("when")
    # An output " wall" passes: it has fewer tokens than "wall", and only spellings of one length are banned.
    assert len(text.ids(" wall")) < len(text.ids("wall"))
    assert answer.bad_words == (text.ids("wall"), text.ids("zq"), text.ids("a"), text.ids(" a"))
    assert text.encode(Encode("b", bad_words=("zq",))) == Encoded("b", (), (text.ids("zq"),))


def test_a_stop_text_before_the_least_tokens_is_text(text: Text) -> None:
    ids = text.ids("ab ab")
    text.handle(Encode("m", n=1, stop=("b",), min_tokens=3))
    (delta,) = text.feed(Delta("m", 0, 0, ids))
    assert ("".join(delta.pieces), delta.finish) == ("ab a", "stop")
    text.handle(Forget("m"))


def test_a_stop_text_cuts_the_delta_and_finishes(text: Text) -> None:
    ids = text.ids("the wall stands again")
    text.handle(Encode("a", n=2, stop=("wall st",)))
    (cut,) = text.feed(Delta("a", 1, 0, ids))
    assert cut.finish == "stop"
    assert "".join(cut.pieces) == "the "
    assert cut.token_ids == ids[: len(cut.pieces)]
    (dropped,) = text.feed(Delta("a", 1, len(ids), (3, 4), finish="length"))
    assert (dropped.token_ids, dropped.pieces, dropped.finish) == ((), (), None)
    (other,) = text.feed(Delta("a", 0, 0, ids[:1]))
    assert other.finish is None
    text.handle(Forget("a"))


def test_a_stop_text_is_found_across_a_replay(text: Text) -> None:
    ids = text.ids("the wall stands again")
    text.handle(Encode("whole", n=1, stop=("stands a",)))
    (whole,) = text.feed(Delta("whole", 0, 0, ids))
    for at in range(len(whole.token_ids)):
        text.handle(Encode("again", n=1, prior=(ids[:at],), stop=("stands a",)))
        (rest,) = text.feed(Delta("again", 0, at, ids[at:]))
        assert rest.pieces == whole.pieces[at:]
        assert rest.finish == "stop"
        text.handle(Forget("again"))
    text.handle(Forget("whole"))


def test_held_back_text_comes_with_the_last_token(text: Text) -> None:
    ids = text.ids("the wall")
    text.handle(Encode("a", n=1, stop=("wall!",)))
    (delta,) = text.feed(Delta("a", 0, 0, ids, finish="length"))
    assert "".join(delta.pieces) == "the wall"
    assert delta.finish == "length"
    text.handle(Forget("a"))


def test_a_choice_that_ends_without_a_token_brings_no_text(text: Text) -> None:
    ids = text.ids("the wall")
    text.handle(Encode("a", n=1, prior=(ids,), stop=("wall!",)))
    last = Delta("a", 0, len(ids), (), finish="length")
    assert text.feed(last) == (last,)
    text.handle(Forget("a"))


def test_a_prompt_that_is_too_long_is_refused_and_not_sent_back(text: Text) -> None:
    words = "the wall stands again"
    limit = len(text.ids(words))
    answer = text.encode(Encode("e", text=words, max_model_len=limit + 1))
    assert answer == Encoded("e", text.ids(words))
    answer = text.encode(Encode("e", text=words, max_model_len=limit))
    explanation = f"the prompt has {limit} tokens; prompt and output together have at most {limit}"
    assert answer == NotEncoded(Refusal("e", "PROMPT_TOO_LONG", explanation))


def test_special_tokens_are_no_text(text: Text) -> None:
    (end,) = text.ids(END)
    text.handle(Encode("a", n=1))
    (delta,) = text.feed(Delta("a", 0, 0, (*text.ids("falls"), end), finish="stop"))
    assert "".join(delta.pieces) == "falls"
    text.handle(Forget("a"))


def test_logprobs_get_their_texts(text: Text) -> None:
    (end,) = text.ids(END)
    token = text.ids("x")[0]
    logprobs = PositionLogprobs(TokenLogprob(token, -1.0), (TokenLogprob(end, -2.0),))
    text.handle(Encode("a", n=1))
    (delta,) = text.feed(Delta("a", 0, 0, (token,), logprobs=(logprobs,)))
    assert delta.logprobs[0].chosen == TokenLogprob(token, -1.0, "x")
    assert delta.logprobs[0].top == (TokenLogprob(end, -2.0, END),)
    text.handle(Forget("a"))


def test_deltas_of_requests_that_are_over_pass_unchanged(text: Text) -> None:
    delta = Delta("unknown", 0, 0, (1, 2))
    assert text.feed(delta) == (delta,)


def test_without_a_tokeniser_only_ids_are_served(tmp_path: Path) -> None:
    """A model with random weights needs no tokeniser."""
    tokenizer = tokenizer_of(StartText(str(tmp_path), ids_only=True))
    assert isinstance(tokenizer, IdsOnly)
    assert tokenizer.longest_token_bytes() == 0
    text = Text(tokenizer)
    for message in (Encode("e", text="words"), Encode("e", messages=(("user", "words"),))):
        answer = text.encode(message)
        assert isinstance(answer, NotEncoded)
        assert answer.refusal.reason == "NO_TOKENIZER"
    text.handle(Encode("a"))
    (delta,) = text.feed(Delta("a", 0, 0, (5, 6), finish="length"))
    assert (delta.token_ids, delta.pieces) == ((5, 6), ("", ""))


def test_a_model_without_chat_template_refuses_conversations(model_dir: Path, tmp_path: Path) -> None:
    text = Text(Tokenizer(str(without_template(model_dir, tmp_path))))
    answer = text.encode(Encode("c", messages=(("user", "when"),)))
    assert isinstance(answer, NotEncoded)
    assert (answer.refusal.id, answer.refusal.reason) == ("c", "NO_CHAT_TEMPLATE")


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
    (without_template(model_dir, tmp_path) / "chat_template.jinja").write_text(template)
    text = Text(Tokenizer(str(tmp_path)))
    answer = text.encode(Encode("c", messages=(("user", "a secret"),)))
    assert isinstance(answer, NotEncoded)
    assert (answer.refusal.id, answer.refusal.reason) == ("c", "INVALID_ARGUMENT")
    assert explanation in answer.refusal.message
    assert "secret" not in answer.refusal.message
    assert isinstance(text.encode(Encode("next", text="the wall")), Encoded)


class Panic(BaseException):
    """Extensions in Rust raise such errors: they derive from BaseException, not from Exception."""


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x" * 5000),
        Panic("index out of bounds"),
        SystemExit("it would end the encoder's thread, and nobody would notice"),
    ],
)
def test_a_tokeniser_that_fails_fails_one_request(error: BaseException) -> None:
    class Failing:
        def encode(self, text: str) -> tuple[int, ...]:
            raise error

    answer = encoder.encode(Failing(), Encode("e", text="a secret"))  # type: ignore[arg-type]  # all that it calls
    assert isinstance(answer, NotEncoded)
    assert (answer.refusal.id, answer.refusal.reason) == ("e", "INVALID_ARGUMENT")
    assert f"{type(error).__name__}: {error}"[:100] in answer.refusal.message
    assert len(answer.refusal.message) < 300


class Slow(IdsOnly):
    """A tokeniser whose `encode` blocks until the test sets `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[str] = []
        self.entered, self.go = threading.Event(), threading.Event()

    def encode(self, text: str) -> tuple[int, ...]:
        self.encoded.append(text)
        self.entered.set()
        assert self.go.wait(10)
        return (7,)


def test_a_cancelled_prompt_is_neither_tokenised_nor_answered() -> None:
    tokenizer, answers, answered = Slow(), list[object](), threading.Event()

    def answer(message: Encoded | NotEncoded) -> None:
        answers.append(message)
        answered.set()

    encoder = Encoder(tokenizer, answer)
    for name in ("runs", "waits", "last"):
        encoder.put(Encode(name, text=name))
    assert tokenizer.entered.wait(10)
    encoder.cancel("waits")
    encoder.cancel("runs")
    encoder.cancel("unknown")
    tokenizer.go.set()
    assert answered.wait(10)
    assert answers == [Encoded("last", (7,))]
    assert tokenizer.encoded == ["runs", "last"]


class Worker(Child):
    """The worker's end of a text process; it also connects engines."""

    def __init__(self, link: Link, engines: socket.socket, process: object = None) -> None:
        super().__init__(process, link)  # type: ignore[arg-type]
        self._engines = engines

    def connect(self, engine: int) -> socket.socket:
        """A socket for an engine of this number."""
        for_engine, for_text = socket.socketpair()
        with for_text:
            socket.send_fds(self._engines, [b"%d" % engine], [for_text.fileno()])
        return for_engine


@contextmanager
def pairs() -> Iterator[tuple[socket.socket, socket.socket, socket.socket, socket.socket]]:
    with contextlib.ExitStack() as stack:
        ends = [*socket.socketpair(), *socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)]
        yield tuple(stack.enter_context(end) for end in ends)  # type: ignore[misc]


@contextmanager
def served(tokenizer: Tokenizer) -> Iterator[Worker]:
    """A text process's main loop, in a thread of this process."""
    with pairs() as (ours, theirs, engines, their_engines):
        link = Link(theirs)

        def run() -> None:
            streams = EngineStreams(their_engines)
            with contextlib.suppress(LinkClosedError), contextlib.closing(streams):
                serve(link, streams, TextService(tokenizer, link.send))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield Worker(Link(ours), engines)
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            assert not thread.is_alive()


@contextmanager
def process() -> Iterator[Worker]:
    """A text process, killed at the end."""
    with pairs() as (ours, theirs, engines, their_engines):
        descriptors = (theirs.fileno(), their_engines.fileno())
        command = [sys.executable, "-m", "engine.text.process"]
        options = ["--fd", str(descriptors[0]), "--engines-fd", str(descriptors[1])]
        child = subprocess.Popen([*command, *options], pass_fds=descriptors)
        theirs.close()
        try:
            yield Worker(Link(ours), engines, child)
        finally:
            child.kill()
            child.wait()


def test_a_step_gets_its_text_while_a_prompt_is_tokenised() -> None:
    tokenizer = Slow()
    with served(tokenizer) as worker, contextlib.closing(Link(worker.connect(3))) as engine:
        worker.send(Encode("live"), Encode("large", text="x"))
        assert worker.expect(Encoded).id == "live"
        assert tokenizer.entered.wait(10)
        engine.send(step_of(Delta("live", 0, 0, (5,))))
        assert worker.expect(Step).deltas[0].pieces == ("",)
        tokenizer.go.set()
        assert worker.expect(Encoded) == Encoded("large", (7,))


def test_what_a_killed_engine_has_half_written_does_not_reach_the_next() -> None:
    with served(IdsOnly()) as worker:
        frame = wire.encode(step_of())
        with worker.connect(3) as engine:
            engine.sendall(frame + frame[:-1])
            assert worker.expect(Step).engine == 3
        with worker.connect(4) as engine:
            engine.sendall(frame)
            assert worker.expect(Step).engine == 4


def test_a_killed_engine_is_waited_for_no_more() -> None:
    with pairs() as (_, _, engines, their_engines):
        streams = EngineStreams(their_engines)
        with contextlib.closing(streams):
            with Worker(None, engines).connect(3):  # type: ignore[arg-type]  # it has no link
                streams.receive([their_engines])
                waited = streams.sockets()
                assert len(waited) == 2
            assert streams.receive(waited[1:]) == []
            assert streams.sockets() == [their_engines], "a closed socket is always readable"


def test_steps_of_an_engine_before_the_newest_are_dropped() -> None:
    with served(IdsOnly()) as worker, worker.connect(3) as old, worker.connect(4) as new:
        worker.send(Encode("r"))
        worker.expect(Encoded)
        with contextlib.suppress(BrokenPipeError):
            old.sendall(wire.encode(step_of()))
        new.sendall(wire.encode(step_of()))
        assert worker.expect(Step).engine == 4


@pytest.mark.timeout(30)
def test_a_tokeniser_that_cannot_decode_is_not_blamed_on_the_engine() -> None:
    """The text process must end: it could not add text to the next steps either."""

    class Undecodable(IdsOnly):
        def decode(self, token_ids: list[int]) -> str:
            raise ValueError("no such token")

    with pairs() as (ours, theirs, engines, their_engines):
        link = Link(theirs)
        service = TextService(Undecodable(), link.send)
        service.handle(Encode("r"))
        with (
            Worker(Link(ours), engines).connect(3) as engine,
            contextlib.closing(EngineStreams(their_engines)) as streams,
        ):
            engine.sendall(wire.encode(step_of(Delta("r", 0, 0, (5,)))))
            ours.setblocking(False)
            with pytest.raises(ValueError, match="no such token"):
                serve(link, streams, service)


def test_an_engine_that_breaks_the_protocol_fails_and_the_next_is_served() -> None:
    with served(IdsOnly()) as worker, worker.connect(3) as engine:
        engine.sendall(b"\x00\x00\x00\x02{}")
        failed = worker.expect(EngineFailed)
        assert failed.message.startswith("the engine broke the protocol")
        assert not failed.permanent
        with worker.connect(4) as engine:
            engine.sendall(wire.encode(step_of()))
            assert worker.expect(Step).engine == 4


def test_a_text_process_serves_engines_and_ends_with_its_worker(model_dir: Path, text: Text) -> None:
    with process() as worker:
        worker.send(StartText(str(model_dir)), Encode("large", text="the wall stands again " * 50_000))
        assert len(END) <= worker.expect(TextReady).longest_token_bytes < 100
        with contextlib.closing(Link(worker.connect(3))) as engine:
            token = text.ids("wall")[0]
            engine.send(step_of(Delta("large", 0, 0, (token,))))
            kinds = [type(worker.expect((Step, Encoded))) for _ in range(2)]  # type: ignore[arg-type]
            assert kinds == [Step, Encoded], "the step waited for the prompt"
        worker.send(Encode("unfinished", text="the wall stands again " * 200_000))
        worker.send(Encode("after it"))
        assert worker.expect(Encoded).id == "after it"
        worker.link.close()  # while the other thread is still inside the tokeniser
        assert worker.process.wait(20) == 0


def test_a_directory_without_tokeniser_is_a_permanent_failure(tmp_path: Path) -> None:
    with process() as worker:
        worker.send(StartText(str(tmp_path)))
        failed = worker.expect(EngineFailed)
        assert (failed.reason, failed.permanent) == ("INVALID_MODEL", True)
