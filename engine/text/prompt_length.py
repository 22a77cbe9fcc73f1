"""Limits of a prompt's length: in tokens and, before it is tokenised, in bytes.

Pure, standard library only: the text process computes the limit in bytes, and its worker applies it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_NORMAL_FORMS = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
_FACTOR = 4  # a character has at most 4 times as many UTF-8 bytes as its normal form
_PARTS = frozenset({"ByteLevel", "Metaspace", "Digits", "Split"})  # pre-tokenisers that keep every character


def too_many_tokens(tokens: int, max_model_len: int) -> str:
    """Why a prompt of this many tokens is refused, as PROMPT_TOO_LONG."""
    return f"the prompt has {tokens} tokens; prompt and output together have at most {max_model_len}"


def too_many_bytes(size: int, max_model_len: int) -> str:
    """Why a prompt of this many bytes of UTF-8 is refused untokenised, as PROMPT_TOO_LONG."""
    return (
        f"the prompt has {size} bytes, more than {max_model_len} tokens hold; "
        f"prompt and output together have at most {max_model_len} tokens"
    )


def longest_token_bytes(tokenizer: Mapping[str, Any]) -> int:
    """An upper bound of the bytes of text, in UTF-8, that one token stands for.

    Args:
        tokenizer: the content of a `tokenizer.json`.

    Returns:
        The bound, or 0 if none is known: some tokenisers leave text out, or make one token of any number of
        unknown characters, or of a special token and all spaces around it.
    """
    model, added = tokenizer["model"], tokenizer.get("added_tokens") or ()
    vocabulary = _vocabulary(model)
    normalizers = list(_flat(tokenizer.get("normalizer"), "normalizers"))
    parts = list(_flat(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    has_bound = (
        model.get("type") in ("BPE", "Unigram")
        and _holds_every_byte(model, vocabulary, [*normalizers, *parts])
        and all(_keeps(normalizer) for normalizer in normalizers)
        and all(part["type"] in _PARTS and part.get("behavior") != "Removed" for part in parts)
        and not any(token.get("lstrip") or token.get("rstrip") for token in added)
    )
    if not has_bound:
        return 0
    tokens = vocabulary | {token["content"] for token in added}
    factor = _FACTOR if any(normalizer["type"] in _NORMAL_FORMS for normalizer in normalizers) else 1
    # A token's spelling in the vocabulary is never shorter than its text: byte-level vocabularies spell a
    # byte with 1 or 2 bytes, others spell a space with 3.
    return factor * max(len(token.encode()) for token in tokens)


def _vocabulary(model: Mapping[str, Any]) -> set[str]:
    vocab = model.get("vocab") or {}
    return set(vocab) if isinstance(vocab, Mapping) else {token for token, _ in vocab}


def _flat(part: Mapping[str, Any] | None, name: str) -> Iterator[Mapping[str, Any]]:
    """The parts of a normaliser or pre-tokeniser, nested sequences flattened."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for inner in part[name]:
        yield from _flat(inner, name)


def _holds_every_byte(model: Mapping[str, Any], vocabulary: set[str], parts: list[Mapping[str, Any]]) -> bool:
    """Whether the vocabulary can spell every text."""
    if any(part["type"] == "ByteLevel" for part in parts):
        return _byte_characters() <= vocabulary
    return bool(model.get("byte_fallback")) and {f"<0x{byte:02X}>" for byte in range(256)} <= vocabulary


def _byte_characters() -> set[str]:
    """The characters by which byte-level vocabularies spell bytes (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return {chr(byte) for byte in (*printable, *range(0x100, 0x100 + 256 - len(printable)))}


def _keeps(normalizer: Mapping[str, Any]) -> bool:
    """Whether normalised text has at least 1/`_FACTOR` of the bytes."""
    match normalizer:
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return len(new.encode()) >= len(old.encode())
        case {"type": "Prepend" | "ByteLevel"}:
            return True
    return normalizer["type"] in _NORMAL_FORMS
