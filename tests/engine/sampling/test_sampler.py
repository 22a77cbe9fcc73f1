from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.sample import SampleSpec, gumbel, sample_tokens, truncate
from engine.plan import StepPlan
from engine.request import SamplingParams
from engine.sampling.logprobs import PromptRows, score_prompts
from engine.sampling.sampler import Sampler

CPU = torch.device("cpu")
VOCABULARY = 50
keys = st.builds(
    lambda seed, choice, position: SampleSpec(SamplingParams(seed=seed), choice, position),
    st.integers(0, 2**64 - 1),
    st.integers(0, 127),
    st.integers(0, 100_000),
)


def logits(rows: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * scale


def candidates(rows: torch.Tensor, params: SamplingParams) -> list[set[int]]:
    """The tokens of each row that can still be sampled."""
    scores = truncate(rows, [params] * len(rows))
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in scores]


@given(keys, st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_noise_is_the_documented_hash(spec: SampleSpec, vocab: int) -> None:
    def mix64(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    def mix32(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    key = mix64(mix64(mix64(spec.sampling.seed) ^ spec.choice) ^ spec.position)
    bits = [mix32(mix32((token + key) % 2**32) ^ key >> 32) for token in range(vocab)]
    wanted = [-math.log(-math.log((b + 0.5) / 2**32)) for b in bits]
    assert gumbel([spec], vocab, CPU)[0].tolist() == pytest.approx(wanted, rel=1e-12)


@given(st.lists(keys, min_size=1, max_size=6), st.data())
@settings(max_examples=50, deadline=None)
def test_a_row_is_sampled_alike_in_every_batch(specs: list[SampleSpec], data: st.DataObject) -> None:
    rows = logits(len(specs))
    together = sample_tokens(rows, specs).tolist()
    order = data.draw(st.permutations(range(len(specs))))
    shuffled = sample_tokens(rows[list(order)], [specs[i] for i in order]).tolist()
    alone = [sample_tokens(rows[i : i + 1], [spec])[0].item() for i, spec in enumerate(specs)]
    assert together == alone
    assert shuffled == [together[i] for i in order]


@pytest.mark.parametrize("field", ["seed", "choice", "position"])
def test_every_part_of_the_key_changes_the_noise(field: str) -> None:
    spec = SampleSpec(SamplingParams(seed=1), 2, 3)
    change = {"sampling": SamplingParams(seed=2)} if field == "seed" else {field: 9}
    other = replace(spec, **change)  # type: ignore[arg-type]
    noise = gumbel([spec, other], 1000, CPU)
    assert (noise[0] != noise[1]).float().mean() > 0.99
    assert abs(torch.corrcoef(noise)[0, 1].item()) < 0.15


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_tokens_are_sampled_by_their_probability(vary: str) -> None:
    row = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    temperature, count = 0.7, 20_000
    specs = [
        SampleSpec(
            SamplingParams(temperature, seed=i if vary == "seed" else 5), 0, i if vary == "position" else 0
        )
        for i in range(count)
    ]
    seen = Counter(sample_tokens(row.repeat(count, 1), specs).tolist())
    probabilities = (row / temperature).softmax(-1).tolist()
    # Pearson's statistic with 4 degrees of freedom is above 23.5 in one case of 10,000.
    statistic = sum((seen[i] - count * p) ** 2 / (count * p) for i, p in enumerate(probabilities))
    assert statistic < 23.5


def test_temperature_0_takes_the_most_likely() -> None:
    rows = logits(8)
    specs = [SampleSpec(SamplingParams(temperature=0, seed=i), 0, i) for i in range(8)]
    assert sample_tokens(rows, specs).tolist() == rows.argmax(-1).tolist()


@given(st.integers(0, 1000), st.integers(1, VOCABULARY + 5))
@settings(max_examples=50, deadline=None)
def test_top_k_keeps_the_k_most_likely(seed: int, k: int) -> None:
    rows = logits(2, seed)
    best = [set(row.topk(min(k, VOCABULARY)).indices.tolist()) for row in rows]
    assert candidates(rows, SamplingParams(top_k=k)) == best


@given(st.integers(0, 1000), st.floats(0.01, 0.99), st.floats(0.5, 2.0))
@settings(max_examples=100, deadline=None)
def test_top_p_keeps_the_smallest_set_that_reaches_p(seed: int, p: float, temperature: float) -> None:
    rows = logits(1, seed)
    (tokens,) = candidates(rows, SamplingParams(temperature, top_p=p))
    probabilities = (rows[0].double() / temperature).softmax(-1)
    mass = probabilities[list(tokens)].sum().item()
    smallest = probabilities[list(tokens)].min().item()
    assert mass >= p - 1e-6
    assert mass - smallest < p + 1e-6
    assert all(probabilities[t] <= smallest for t in range(VOCABULARY) if t not in tokens)


def test_top_p_is_taken_of_what_top_k_left() -> None:
    row = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert candidates(row, SamplingParams(top_k=2, top_p=0.55)) == [{0}]  # 0.4 of 0.7 is 0.57
    assert candidates(row, SamplingParams(top_p=0.55)) == [{0, 1}]


@given(st.integers(0, 1000), st.floats(0.01, 1.0))
@settings(max_examples=50, deadline=None)
def test_min_p_keeps_what_is_likely_enough_beside_the_most_likely(seed: int, min_p: float) -> None:
    rows = logits(1, seed)
    probabilities = rows[0].double().softmax(-1)
    (tokens,) = candidates(rows, SamplingParams(min_p=min_p))
    ratio = probabilities / probabilities.max()
    assert all(ratio[t] >= min_p * (1 - 1e-5) for t in tokens)
    assert all(ratio[t] <= min_p * (1 + 1e-5) for t in range(VOCABULARY) if t not in tokens)
    assert int(rows[0].argmax()) in tokens


def test_the_most_likely_token_is_always_a_candidate() -> None:
    rows = logits(4)
    assert candidates(rows, SamplingParams(top_p=1e-9, min_p=1.0)) == [{int(row.argmax())} for row in rows]


def test_rows_of_one_batch_keep_their_own_parameters() -> None:
    params = [
        SamplingParams(top_k=3),
        SamplingParams(),
        SamplingParams(0.5, top_p=0.5),
        SamplingParams(min_p=0.3),
    ]
    rows = logits(4)
    together = truncate(rows, params).isfinite()
    alone = torch.cat([truncate(rows[i : i + 1], [p]) for i, p in enumerate(params)]).isfinite()
    assert torch.equal(together, alone)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    rows = logits(2)
    hot = SamplingParams(temperature=5.0, top_k=40, seed=3)
    specs = [SampleSpec(hot, 0, 0, logprobs=3), SampleSpec(hot, 0, 1, logprobs=None)]
    sampled = Sampler(sample_tokens, CPU).sample(StepPlan(1, 7), rows, specs)()
    entry, nothing = sampled.logprobs
    assert nothing is None
    assert entry is not None
    raw = rows[0].log_softmax(-1)
    assert entry.chosen.token_id == sampled.token_ids[0]
    assert entry.chosen.logprob == raw[sampled.token_ids[0]].item()
    assert [(t.token_id, t.logprob) for t in entry.top] == list(
        zip(raw.topk(3).indices.tolist(), raw.topk(3).values.tolist(), strict=True)
    )


def test_logprobs_without_alternatives_have_the_chosen_token_alone() -> None:
    specs = [SampleSpec(SamplingParams(), 0, 0, logprobs=0)]
    (entry,) = Sampler(sample_tokens, CPU).sample(StepPlan(1, 1), logits(1), specs)().logprobs
    assert entry is not None
    assert entry.top == ()


def test_a_prompt_is_scored_a_few_rows_at_a_time() -> None:
    rows = logits(200)
    asked: list[int] = []

    def some(asked_rows: torch.Tensor) -> torch.Tensor:
        asked.append(len(asked_rows))
        return rows[asked_rows]

    targets = tuple(range(50)) * 3
    (scored,) = score_prompts([PromptRows(4, 20, targets, 2)], some)
    assert scored.chunk == 4
    assert sum(asked) == len(targets)
    assert max(asked) <= 64
    raw = rows[20:170].log_softmax(-1)
    assert [entry.chosen.token_id for entry in scored.positions] == list(targets)
    assert [entry.chosen.logprob for entry in scored.positions] == [
        raw[i, t].item() for i, t in enumerate(targets)
    ]
    assert [len(entry.top) for entry in scored.positions] == [2] * len(targets)
