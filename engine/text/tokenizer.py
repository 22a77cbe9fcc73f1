"""A model's tokeniser and chat template, by the few calls that serving needs."""

from __future__ import annotations

import json
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.config import TOKENIZER_FILES
from engine.errors import ModelError, RequestError
from engine.ipc.wire import StartText
from engine.text.detokenizer import Decode
from engine.text.prompt_length import longest_token_bytes


class Tokenizer:
    """A model's tokeniser.

    One thread may encode while another decodes. `tokenizers` allows that as long as nothing changes the
    tokeniser's settings; after the constructor, nothing does.
    """

    def __init__(self, model_dir: str) -> None:
        self._tokenizer = load_tokenizer(model_dir)
        self._decode = _decoder(self._tokenizer)
        self._decode_one = lru_cache(maxsize=1 << 16)(lambda token_id: self._decode([token_id]))
        self.token_text = lru_cache(maxsize=1 << 16)(self._token_text)
        # A token before the first keeps the leading space of tokenisers that strip it. This first call also
        # turns off the truncation and padding that a tokenizer.json may ask for.
        self.context = self._tokenizer.encode("a", add_special_tokens=False)[-1:]

    def longest_token_bytes(self) -> int:
        """An upper bound of the bytes that one token stands for, 0 where none is known."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        return 0 if backend is None else longest_token_bytes(json.loads(backend.to_str()))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt, with the special tokens that the model expects around it."""
        return tuple(self._tokenizer.encode(text))

    def encode_chat(self, messages: tuple[tuple[str, str], ...]) -> tuple[int, ...]:
        """Token ids of a conversation by the chat template, up to where the assistant answers.

        Raises:
            RequestError: NO_CHAT_TEMPLATE, or INVALID_ARGUMENT when the template refuses it.
        """
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise RequestError("NO_CHAT_TEMPLATE", "the model has no chat template; send a text prompt")
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            ids = self._tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except TemplateError as error:
            raise RequestError("INVALID_ARGUMENT", f"the chat template refuses this: {error}") from error
        return tuple(ids)

    def encode_word(self, word: str) -> list[tuple[int, ...]]:
        """The spellings of a word as token ids: at the beginning of an output, and after a space.

        The second is left out unless it has as many tokens as the first, and another first token.
        """
        bare = word.lstrip()
        spellings = [self._tokenizer.encode(text, add_special_tokens=False) for text in (bare, f" {bare}")]
        alone, spaced = map(tuple, spellings)
        if len(spaced) == len(alone) and spaced[:1] != alone[:1]:
            return [alone, spaced]
        return [alone]

    def decode(self, token_ids: list[int]) -> str:
        """Text of tokens without special ones."""
        return self._decode_one(*token_ids) if len(token_ids) == 1 else self._decode(token_ids)

    def _token_text(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False))


class IdsOnly(Tokenizer):
    """Replaces the tokeniser of a model without any: refuses prompts of text, decodes to the empty text."""

    def __init__(self) -> None:
        self.token_text = lru_cache(maxsize=1)(lambda token_id: "")
        self.context = []

    def longest_token_bytes(self) -> int:
        """0: no bound is known."""
        return 0

    def encode(self, text: str) -> tuple[int, ...]:
        """Raise RequestError: NO_TOKENIZER."""
        raise RequestError("NO_TOKENIZER", "the model has no tokeniser; send token ids")

    def encode_chat(self, messages: tuple[tuple[str, str], ...]) -> tuple[int, ...]:
        """Raise RequestError: NO_TOKENIZER."""
        return self.encode("")

    def encode_word(self, word: str) -> list[tuple[int, ...]]:
        """Raise RequestError: NO_TOKENIZER."""
        return [self.encode(word)]

    def decode(self, token_ids: list[int]) -> str:
        """The empty text."""
        return ""


def tokenizer_of(start: StartText) -> Tokenizer:
    """The model's tokeniser, or `IdsOnly` where the model has none and `start` allows that.

    Raises:
        ModelError: INVALID_MODEL.
    """
    has_one = any((Path(start.model) / name).is_file() for name in TOKENIZER_FILES)
    return Tokenizer(start.model) if has_one or not start.ids_only else IdsOnly()


def load_tokenizer(model_dir: str) -> Any:
    """The model's own tokeniser, never its code.

    Raises:
        ModelError: INVALID_MODEL, when the directory has none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            "INVALID_MODEL", f"{model_dir} has no tokeniser that can be loaded: {error}"
        ) from error


def forgo_torch() -> None:
    """Keep transformers from importing torch: no tokeniser needs it, and it is half of the start-up time."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _decoder(tokenizer: Any) -> Decode:
    """The fastest function with the result of the tokeniser's `decode` without special tokens.

    A replay decodes thousands of tokens, and every stream of the replica waits for it.
    """
    from transformers import PreTrainedTokenizerFast

    if getattr(type(tokenizer), "_decode", None) is PreTrainedTokenizerFast._decode:
        decode = tokenizer.backend_tokenizer.decode  # a quarter of the time
        return lambda ids: str(decode(ids, skip_special_tokens=True))
    return lambda ids: str(
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
