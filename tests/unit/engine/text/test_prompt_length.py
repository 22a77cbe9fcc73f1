from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from engine.text.prompt_length import longest_token_bytes

WORDS = ["the phalanx    closes its ranks      when a soldier falls ждёт"] * 20
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}


def byte_level(normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(WORDS, trainer)
    tokenizer.add_special_tokens(["<|a special token|>"])
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2 has it."""
    vocab = {"<unk>": 256, "▁": 257, "▁▁": 258, "a": 259, "b": 260, "ab": 261}
    model = models.BPE(
        BYTES | vocab, [("▁", "▁"), ("a", "b")], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def bound(tokenizer: Tokenizer) -> int:
    return longest_token_bytes(json.loads(tokenizer.to_str()))


BOUNDED = [byte_level(), byte_level(normalizers.NFC()), byte_level(normalizers.NFKC()), sentencepiece()]
TEXTS = st.text() | st.text("a bжΐ\u1fbe\u0308\u0301K𝐊") | st.sampled_from(["the phalanx " * 9, " " * 99])


@pytest.mark.parametrize("tokenizer", BOUNDED)
@given(text=TEXTS)
def test_no_text_has_more_bytes_than_its_tokens_can_have(tokenizer: Tokenizer, text: str) -> None:
    assert 0 < bound(tokenizer) < 200
    assert len(text.encode()) <= len(tokenizer.encode(text, add_special_tokens=False).ids) * bound(tokenizer)


def test_a_special_token_may_be_the_longest() -> None:
    assert bound(byte_level()) == len("<|a special token|>")


def _unknown_words(tokenizer: Tokenizer) -> None:
    tokenizer.model = models.WordLevel({"<unk>": 0}, unk_token="<unk>")


def _missing_bytes(tokenizer: Tokenizer) -> None:
    tokenizer.model = models.BPE({"a": 0}, [])


def _removed_spaces(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(use_regex=False)]
    )


def _words_only(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()]
    )


def _stripped(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Strip()


def _shortened(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Replace("aaaa", "a")


def _greedy_special_token(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken("<s>", rstrip=True)])


@pytest.mark.parametrize(
    "spoil",
    [
        _unknown_words,
        _missing_bytes,
        _removed_spaces,
        _words_only,
        _stripped,
        _shortened,
        _greedy_special_token,
    ],
)
def test_no_bound_is_claimed_where_text_can_vanish(spoil: Callable[[Tokenizer], None]) -> None:
    tokenizer = byte_level()
    spoil(tokenizer)
    assert bound(tokenizer) == 0


@pytest.mark.parametrize(("form", "parts"), [("NFC", "NFD"), ("NFKC", "NFKD")])
def test_no_spelling_is_more_than_four_times_as_long_as_its_normal_form(form: Any, parts: Any) -> None:
    characters = [chr(code) for code in range(0x30000) if not 0xD800 <= code < 0xE000]
    longest: dict[str, int] = {}
    for character in characters:
        part = unicodedata.normalize(parts, character)
        longest[part] = max(longest.get(part, 0), len(character.encode()))
    for character in characters:
        spelling = sum(longest[part] for part in unicodedata.normalize(parts, character))
        assert len(character.encode()) <= spelling, "a character is no longer than what it is made of"
        if unicodedata.normalize(form, character) == character:
            assert spelling <= 4 * len(character.encode())
