"""The engine as a library."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import Engine
from engine.child_ranks import ChildRanks
from engine.config import EngineConfig
from engine.errors import EngineError, ModelError, RequestError
from engine.ipc.wire import EngineReady, Rendezvous, StartEngine, Step, SubmitRequest
from engine.request import Request, SamplingParams
from engine.text.tokenizer import Tokenizer
from tests.engine.child import child

GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Iterator[Engine]:
    with Engine(str(model_dir), threads=1, max_model_len=256) as engine:
        yield engine


def test_texts_are_completed_with_texts(engine: Engine) -> None:
    (one,) = engine.generate(["the shield"], GREEDY, max_tokens=6, ignore_eos=True)
    assert one.text is not None
    assert (len(one.token_ids), one.finish) == (6, "length")
    (again,) = engine.generate([[263, 267]], GREEDY, max_tokens=6, ignore_eos=True)
    assert again.text is None


def test_completions_come_by_prompt_and_choice(engine: Engine) -> None:
    done = engine.generate(
        [[1, 2], [3]], SamplingParams(seed=1), max_tokens=4, n=2, logprobs=1, ignore_eos=True
    )
    assert [(c.prompt, c.choice) for c in done] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(len(c.logprobs) == len(c.token_ids) == 4 for c in done)
    assert done[0].token_ids != done[1].token_ids


def test_a_refused_prompt_leaves_nothing_behind(engine: Engine) -> None:
    with pytest.raises(RequestError) as caught:
        engine.generate([[1, 2], []], GREEDY)
    assert caught.value.reason == "EMPTY_PROMPT"
    assert len(engine.generate([[1, 2]], GREEDY)) == 1


def test_progress_can_be_shown(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.generate([[1, 2], [3]], GREEDY, max_tokens=[2, 3], progress=True, ignore_eos=True)
    captured = capsys.readouterr()
    assert "2/2" in captured.err
    assert not captured.out


def test_prompts_have_lengths_of_their_own(engine: Engine) -> None:
    done = engine.generate([[1, 2], [3]], GREEDY, max_tokens=[2, 3], ignore_eos=True)
    assert [len(c.token_ids) for c in done] == [2, 3]
    with pytest.raises(ValueError, match="zip"):
        engine.generate([[1, 2], [3]], GREEDY, max_tokens=[2])
    assert not engine.busy


def test_requests_can_arrive_between_steps(engine: Engine) -> None:
    expected = engine.generate([[1, 2], [3, 4]], GREEDY, max_tokens=6, ignore_eos=True)
    engine.submit(Request("first", (1, 2), GREEDY, 6, ignore_eos=True))
    tokens: dict[str, list[int]] = {"first": [], "second": []}
    with pytest.raises(EngineError, match="submit") as caught:
        engine.generate([[5]])
    assert caught.value.reason == "BUSY"
    while engine.busy:
        for delta in engine.step():
            tokens[delta.id].extend(delta.token_ids)
        if len(tokens["first"]) == 2:
            engine.submit(Request("second", (3, 4), GREEDY, 6, ignore_eos=True))
    assert list(tokens.values()) == [c.token_ids for c in expected]


def test_a_cancelled_request_is_forgotten(engine: Engine) -> None:
    engine.submit(Request("gone", (1, 2), GREEDY, 6, ignore_eos=True))
    engine.step()
    engine.cancel("gone")
    assert not engine.busy
    assert engine.load.running == 0


def test_a_closed_engine_says_so(model_dir: Path) -> None:
    engine = Engine(str(model_dir), threads=1)
    engine.close()
    with pytest.raises(EngineError) as caught:
        engine.generate([[1]])
    assert caught.value.reason == "CLOSED"


def test_a_model_that_cannot_be_served_is_an_error_at_once(tmp_path: Path, model_dir: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        Engine(str(tmp_path))
    with pytest.raises(ModelError, match="TP 3"):
        Engine(str(model_dir), tp=3)
    with pytest.raises(ModelError, match="exceeds the model's 512 positions"):
        Engine(str(model_dir), max_model_len=513)
    with pytest.raises(ModelError, match="KV memory holds"):
        Engine(str(model_dir), max_model_len=500, kv_bytes=100_000)


def test_little_kv_memory_shortens_the_longest_sequence(model_dir: Path) -> None:
    with Engine(str(model_dir), kv_bytes=50_000, threads=1) as engine:
        assert engine.max_model_len == 48
        (done,) = engine.generate([[1] * 40], GREEDY, max_tokens=8, ignore_eos=True)
        assert len(done.token_ids) == 8


def test_recomputed_sequences_continue_to_the_last_bit(engine: Engine, model_dir: Path) -> None:
    """KV memory has room for 6 blocks. 6 sequences that grow to 5 blocks each preempt each other."""
    prompts = [[i + 1] * (11 + i) for i in range(6)]
    sampling = SamplingParams(seed=9)
    with Engine(
        str(model_dir), kv_bytes=6 * 16_384, max_model_len=96, max_batch_tokens=24, threads=1
    ) as tight:
        squeezed = tight.generate(prompts, sampling, max_tokens=60, ignore_eos=True, logprobs=1)
    roomy = engine.generate(prompts, sampling, max_tokens=60, ignore_eos=True, logprobs=1)
    assert [c.token_ids for c in squeezed] == [c.token_ids for c in roomy]
    assert [c.logprobs for c in squeezed] == [c.logprobs for c in roomy]


def test_the_end_of_sequence_is_no_part_of_the_text(engine: Engine, model_dir: Path) -> None:
    """At this temperature all 320 tokens are about equally likely, and the end of sequence is one of them."""
    done = engine.generate(["the shield"], SamplingParams(temperature=50.0, seed=3), max_tokens=200, n=16)
    ended = [c for c in done if c.finish == "stop"]
    assert ended
    tokenizer = Tokenizer(str(model_dir))
    for completion in ended:
        assert completion.token_ids[-1] == 0
        assert completion.text is not None
        assert "<|end|>" not in completion.text
        assert completion.text == tokenizer.decode(completion.token_ids)


def test_the_tokeniser_is_loaded_once(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(directory: str) -> Tokenizer:
        loaded.append(directory)
        return Tokenizer(directory)

    monkeypatch.setattr("engine.api.Tokenizer", load)
    with Engine(str(model_dir), threads=1, max_model_len=64) as engine:
        for _ in range(2):
            engine.generate(["the"], GREEDY, max_tokens=2)
    assert loaded == [str(model_dir)]


def test_options_reach_every_rank_and_ranks_outlive_the_thread_that_made_them(model_dir: Path) -> None:
    """Rank 1 gets `max_running` too: its pool has as many blocks as rank 0's, more than by default."""
    made: list[Engine] = []

    def make() -> None:
        made.append(Engine(str(model_dir), tp=2, threads=1, max_model_len=16, max_running=100))

    maker = threading.Thread(target=make)
    maker.start()
    maker.join()
    (engine,) = made
    with engine:
        assert engine._running().load.kv_blocks_total == 100
        (process,) = engine._child_ranks.processes
        prompts = [[i + 1, 2] for i in range(100)]
        done = engine.generate(prompts, GREEDY, max_tokens=4, ignore_eos=True)
        assert process.poll() is None
    with Engine(str(model_dir), threads=1, max_model_len=16, max_running=100) as alone:
        expected = alone.generate(prompts, GREEDY, max_tokens=4, ignore_eos=True)
    assert [c.token_ids for c in done] == [c.token_ids for c in expected]


@pytest.mark.timeout(90)  # without the check only the groups' own time-out ends it, after 10 minutes
def test_a_rank_that_dies_while_starting_ends_the_start(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce = ChildRanks.announce

    def announce_and_kill(ranks: ChildRanks, address: str) -> None:
        announce(ranks, address)
        ranks.processes[0].kill()

    monkeypatch.setattr(ChildRanks, "announce", announce_and_kill)
    with pytest.raises(EngineError, match="rank 1 has ended") as caught:
        Engine(str(model_dir), tp=2, threads=1)
    assert caught.value.reason == "RANK_LOST"


def test_every_rank_has_the_smallest_pool(model_dir: Path) -> None:
    """A plan may use any block of rank 0, so every rank must have it."""
    with child("engine.processes.rank") as leader, child("engine.processes.rank") as other:
        for rank, (process, max_running) in enumerate([(leader, 8), (other, 3)]):
            process.send(
                StartEngine(
                    EngineConfig(
                        str(model_dir), tp=2, rank=rank, max_model_len=32, max_running=max_running, threads=1
                    )
                )
            )
        other.send(leader.expect(Rendezvous))
        leader.expect(EngineReady)
        leader.send(SubmitRequest(Request("a", (1, 2), GREEDY, max_tokens=1)))
        assert leader.expect(Step).load.kv_blocks_total == 3 * 2
