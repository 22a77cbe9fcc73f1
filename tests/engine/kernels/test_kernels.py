"""Every native kernel agrees with the reference, and no row's bits depend on the rows beside it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from engine.kernels import choose, native_library
from engine.kernels.choose import choose_kernels
from engine.kernels.interface import HeadNorms, Kernels
from engine.kernels.native import NativeCache, NativeKernels
from engine.kernels.reference import ReferenceKernels
from engine.kernels.sample import SampleSpec, sample_tokens
from engine.request import SamplingParams
from tests.engine.heads import Heads, numbers
from tests.engine.logits import SAMPLINGS, scores

CPU = torch.device("cpu")
FLAGS = native_library.cpu_flags()
VARIANTS = [name for name, needed in native_library.VARIANTS.items() if FLAGS.issuperset(needed)]
pytestmark = pytest.mark.skipif(not VARIANTS, reason="no native kernels for this CPU")

REFERENCE = ReferenceKernels(CPU, torch.float32)
EVERY_FORMAT = [(torch.float32, ""), (torch.bfloat16, ""), (torch.bfloat16, "int8"), (torch.float32, "int4")]
# The maximum rounding error of a weight, as a share of the largest weight with the same scale.
TOLERANCE = {"": 2**-8, "int8": 1 / 127, "int4": 1 / 7}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def kernels_of(variant: str, dtype: torch.dtype, quantisation: str = "", threads: int = 2) -> NativeKernels:
    library = native_library.open_library(variant)
    return NativeKernels(library, dtype, quantisation, threads=threads)


def test_this_cpu_gets_its_best_variant() -> None:
    kernels = choose_kernels(CPU, torch.bfloat16)
    assert VARIANTS[0] in kernels.name


@pytest.mark.parametrize(("dtype", "quantisation"), EVERY_FORMAT)
@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (37, 130), (5, 2), (96, 6000)])
def test_linear_is_the_product_with_the_weights_it_holds(
    variant: str, dtype: torch.dtype, quantisation: str, rows: int, columns: int
) -> None:
    kernels = kernels_of(variant, dtype, quantisation)
    matrix, weight, bias = kernels.matrix(rows, columns), numbers(rows, columns), numbers(rows, seed=1)
    matrix.write(0, weight[:20])
    matrix.write(min(20, rows), weight[20:])
    stored = kernels.embed(torch.arange(rows), matrix)
    error = (stored - weight).abs().amax() / weight.abs().amax()
    assert error <= (0 if (dtype, quantisation) == (torch.float32, "") else TOLERANCE[quantisation])
    x = numbers(27, columns, seed=2)
    rounds_x = variant == "avx512_bf16" and not quantisation and dtype == torch.bfloat16
    torch.testing.assert_close(
        kernels.linear(x, matrix, bias),
        (x.bfloat16().float() if rounds_x else x) @ stored.T + bias,
        rtol=1e-4,
        atol=1e-5 * columns,
    )


@pytest.mark.parametrize("columns", [64, 38])
def test_swiglu_agrees_with_the_reference(variant: str, columns: int) -> None:
    kernels, x = kernels_of(variant, torch.float32), numbers(19, 32)
    weight, bias = numbers(2 * columns, 32, seed=1), numbers(2 * columns, seed=2)
    results = []
    for each in (kernels, REFERENCE):
        matrix = each.matrix(2 * columns, 32, gated=True)
        matrix.write(0, weight[: columns + 3])
        matrix.write(columns + 3, weight[columns + 3 :])
        results.append(each.swiglu(x, matrix, bias))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [64, 33, 10])
def test_norm_agrees_with_the_reference_and_adds_in_place(variant: str, size: int) -> None:
    weight, results = numbers(size), []
    for each in (kernels_of(variant, torch.float32), REFERENCE):
        x = numbers(5, size, seed=1)
        results += [each.add_rms_norm(x, numbers(5, size, seed=2), weight, 1e-5), x]
        results.append(each.add_rms_norm(x, None, weight, 1e-5))
    for ours, expected in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(9, 3, 64), (8, 1, 32), (4, 4, 16), (14, 2, 10), (2, 1, 128)]
)
@pytest.mark.parametrize("window", [None, 1, 70])
def test_attention_agrees_with_the_reference(
    variant: str, heads: int, kv_heads: int, size: int, window: int | None
) -> None:
    data = Heads(heads, kv_heads, size, 150)
    norms = HeadNorms(1 + numbers(size, seed=3) / 8, 1 + numbers(size, seed=4) / 8, 1e-6)
    kernels = kernels_of(variant, torch.float32)
    ours, expected = data.cache(kernels), data.cache(REFERENCE)
    for parts in (
        [(0, 0, 40), (1, 0, 7)],
        [(1, 7, 8), (0, 40, 129), (2, 0, 33)],
        [(0, 129, 150), (2, 33, 34), (1, 8, 20)],
    ):
        pairs = zip(
            data.step(kernels, ours, parts, window=window, norms=norms),
            data.step(REFERENCE, expected, parts, window=window, norms=norms),
            strict=True,
        )
        for got, wanted in pairs:
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


def test_bf16_keys_and_values_cost_no_more_than_their_rounding(variant: str) -> None:
    data, kernels = Heads(6, 2, 64, 96), kernels_of(variant, torch.bfloat16)
    got = data.step(kernels, data.cache(kernels), [(0, 0, 96)])[0]
    wanted = data.step(REFERENCE, data.cache(REFERENCE), [(0, 0, 96)])[0]
    torch.testing.assert_close(got, wanted, rtol=0, atol=4 * 2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
def test_no_bit_of_attention_depends_on_chunks_or_neighbours(
    variant: str, dtype: torch.dtype, window: int | None
) -> None:
    data, kernels = Heads(6, 2, 64, 150), kernels_of(variant, dtype)
    alone = data.step(kernels, data.cache(kernels), [(0, 0, 150)], window=window)[0]
    cache, rows, start = data.cache(kernels), [], 0
    for size in (1, 13, 2, 64, 30, 1, 39):
        neighbours = [(1, start, start + size), (2, start, start + 1)]
        rows.append(data.step(kernels, cache, [(0, start, start + size), *neighbours], window=window)[0])
        start += size
    assert torch.equal(torch.cat(rows), alone)


@pytest.mark.parametrize(("dtype", "quantisation"), EVERY_FORMAT)
@pytest.mark.parametrize("gated", [False, True])
def test_no_bit_of_a_product_depends_on_the_rows_beside_it_or_on_threads(
    variant: str, dtype: torch.dtype, quantisation: str, gated: bool
) -> None:
    x, products = numbers(70, 192), []
    for threads in (2, 1, 5):
        kernels = kernels_of(variant, dtype, quantisation, threads)
        matrix = kernels.matrix(150, 192, gated=gated)
        matrix.write(0, numbers(150, 192, seed=1))
        product = kernels.swiglu if gated else kernels.linear
        products += [product(x[:rows].contiguous(), matrix) for rows in (70, 1, 2, 3, 5, 8, 12, 13, 29)]
    assert all(torch.equal(part, products[0][: part.shape[0]]) for part in products)


def test_callers_on_several_threads_disturb_nobody(variant: str) -> None:
    def run(seed: int) -> list[torch.Tensor]:
        kernels = kernels_of(variant, torch.float32)
        matrix = kernels.matrix(96, 64)
        matrix.write(0, numbers(96, 64, seed=seed))
        return [kernels.linear(numbers(5, 64, seed=seed + i), matrix) for i in range(50)]

    expected = [run(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for got, wanted in zip(threads.map(run, range(4)), expected, strict=True):
            assert all(map(torch.equal, got, wanted))


def test_what_a_block_held_before_does_not_matter(variant: str) -> None:
    data, kernels = Heads(4, 2, 32, 60), kernels_of(variant, torch.bfloat16)
    clean = data.step(kernels, data.cache(kernels), [(0, 0, 37)])[0]
    cache = data.cache(kernels)
    assert isinstance(cache, NativeCache)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    assert torch.equal(data.step(kernels, cache, [(0, 0, 37)])[0], clean)


@pytest.mark.parametrize("native_cache", [True, False])
def test_a_copied_block_is_read_like_the_original(variant: str, native_cache: bool) -> None:
    data = Heads(4, 2, 32, 30)
    kernels: Kernels = kernels_of(variant, torch.float32) if native_cache else REFERENCE
    cache = data.cache(kernels)
    expected = data.step(kernels, cache, [(0, 0, 30)])[0][20:]
    data.qkv[1, 20:] = data.qkv[0, 20:]
    cache.copy_blocks(tuple(zip(data.tables[0].tolist(), data.tables[1].tolist(), strict=True)))
    assert torch.equal(data.step(kernels, cache, [(1, 20, 30)])[0], expected)


def test_a_library_that_computes_wrong_products_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_multiplies_correctly", lambda library: False)
    assert choose.best_native_library.__wrapped__() is None


@pytest.mark.parametrize("shape", ["random", "equal", "peaked", "masked"])
@pytest.mark.parametrize("vocabulary", [1000, 33, 20001])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_rows_sample_what_the_definition_samples(
    variant: str, shape: str, vocabulary: int, sampling: SamplingParams
) -> None:
    logits = scores(shape, vocabulary)
    specs = [SampleSpec(replace(sampling, seed=17 * row), 0, row) for row in range(len(logits))]
    sampled = kernels_of(variant, torch.float32).sample(logits, specs)
    assert sampled.tolist() == sample_tokens(logits, specs).tolist()


def test_sampling_from_nan_ends(variant: str) -> None:
    logits = torch.full((2, 50), torch.nan)
    specs = [SampleSpec(SamplingParams(temperature=t, top_p=0.5), 0, 0) for t in (0.0, 1.0)]
    sampled = kernels_of(variant, torch.float32).sample(logits, specs)
    assert all(0 <= token < 50 for token in sampled.tolist())
