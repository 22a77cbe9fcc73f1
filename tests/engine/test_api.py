"""The engine as a library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import Engine
from engine.errors import EngineError, ModelError, RequestError
from engine.request import SamplingParams

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
    engine.generate([[1, 2]], GREEDY, max_tokens=2, progress=True)
    assert "100%" in capsys.readouterr().out


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
    """With KV memory for 6 blocks, 6 sequences that grow to 5 blocks each keep pushing each other out."""
    prompts = [[i + 1] * (11 + i) for i in range(6)]
    sampling = SamplingParams(seed=9)
    with Engine(
        str(model_dir), kv_bytes=6 * 16_384, max_model_len=96, max_batch_tokens=24, threads=1
    ) as tight:
        squeezed = tight.generate(prompts, sampling, max_tokens=60, ignore_eos=True, logprobs=1)
    roomy = engine.generate(prompts, sampling, max_tokens=60, ignore_eos=True, logprobs=1)
    assert [c.token_ids for c in squeezed] == [c.token_ids for c in roomy]
    assert [c.logprobs for c in squeezed] == [c.logprobs for c in roomy]
