"""Entry point of the text process: `python -m engine.text.process --fd N`, N a socket of `engine.ipc.wire`.

Owns: the tokeniser, the chat template, and per live request the text of its choices.
Does not own: tokens; deltas pass through in order. Answers in the order of questions.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from engine.config import TOKENIZER_FILES
from engine.errors import EngineError, ModelError, RequestError
from engine.ipc.background import import_in_background
from engine.ipc.link import Link, LinkClosedError, die_with_parent
from engine.ipc.wire import (
    Encode,
    Encoded,
    EngineFailed,
    Forget,
    Message,
    NotEncoded,
    StartText,
    Step,
    TextReady,
    Track,
)
from engine.request import Delta, PositionLogprobs, Refusal
from engine.text.detokenizer import ChoiceText, Decode, Detokenizer
from engine.text.prompt_length import longest_token_bytes, too_many_tokens

_MOST_OF_ERROR = 200  # characters; a longer one is likely to quote the prompt


class Tokenizer:
    """A model's tokeniser, by the few calls that serving needs."""

    def __init__(self, model_dir: str) -> None:
        self._tokenizer = load_tokenizer(model_dir)
        self._decode = _decoder(self._tokenizer)
        self._decode_one = lru_cache(maxsize=1 << 16)(lambda token_id: self._decode([token_id]))
        self.token_text = lru_cache(maxsize=1 << 16)(self._token_text)
        # A token before the first keeps the leading space of tokenisers that strip it.
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
        """Token ids of a word as it is, and after a space where that is spelled with another first token."""
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
    """Stands in for a tokeniser that a model without trained weights need not have: no text, either way."""

    def __init__(self) -> None:
        self.token_text = lru_cache(maxsize=1)(lambda token_id: "")
        self.context = []

    def longest_token_bytes(self) -> int:
        """Unknown."""
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
        """Nothing."""
        return ""


def tokenizer_of(start: StartText) -> Tokenizer:
    """The model's tokeniser, or what stands in for it where the model may do without and does.

    Raises:
        ModelError: INVALID_MODEL.
    """
    has_one = any((Path(start.model) / name).is_file() for name in TOKENIZER_FILES)
    return Tokenizer(start.model) if has_one or not start.ids_only else IdsOnly()


class TextService:
    """Answers messages; see `engine.ipc.wire` for what each means."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._choices: dict[str, list[ChoiceText]] = {}

    def handle(self, message: Message) -> Message | None:
        """The answer to a message, if it has one."""
        match message:
            case Encode():
                return self._encode(message)
            case Track():
                self._choices[message.id] = [self._track(message, choice) for choice in range(message.n)]
                return None
            case Forget(request_id):
                self._choices.pop(request_id, None)
                return None
            case Step():
                return replace(message, deltas=tuple(map(self._fill, message.deltas)))
            case _:
                raise EngineError("INTERNAL", f"unexpected {type(message).__name__}")

    def _encode(self, message: Encode) -> Encoded | NotEncoded:
        try:
            ids: tuple[int, ...] = ()
            if message.text is not None:
                ids = self._tokenizer.encode(message.text)
            elif message.messages:
                ids = self._tokenizer.encode_chat(message.messages)
            words = [ids for word in message.bad_words for ids in self._tokenizer.encode_word(word)]
        except RequestError as error:
            return NotEncoded(Refusal(message.id, error.reason, error.message))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in the tokeniser's Rust is no Exception
            explanation = f"{type(error).__name__}: {error}"[:_MOST_OF_ERROR]
            return NotEncoded(
                Refusal(message.id, "INVALID_ARGUMENT", f"the prompt cannot be tokenised: {explanation}")
            )
        if 0 < message.max_model_len <= len(ids):
            explanation = too_many_tokens(len(ids), message.max_model_len)
            return NotEncoded(Refusal(message.id, "PROMPT_TOO_LONG", explanation))
        return Encoded(message.id, ids, tuple(words))

    def _track(self, message: Track, choice: int) -> ChoiceText:
        detokenizer = Detokenizer(self._tokenizer.decode, self._tokenizer.context)
        text = ChoiceText(detokenizer, message.stop, message.min_tokens)
        for token_id in message.prior[choice] if message.prior else ():
            text.push(token_id)
        return text

    def _fill(self, delta: Delta) -> Delta:
        if delta.id not in self._choices:
            return delta
        text = self._choices[delta.id][delta.choice]
        if text.stopped:
            return replace(delta, token_ids=(), logprobs=(), finish=None, timing=None)
        pieces: list[str] = []
        for token_id in delta.token_ids:
            pieces.append(text.push(token_id))
            if text.stopped:
                break
        if delta.finish and not text.stopped and pieces:
            pieces[-1] += text.flush()
        count = len(pieces)
        return replace(
            delta,
            token_ids=delta.token_ids[:count],
            pieces=tuple(pieces),
            logprobs=tuple(map(self._with_texts, delta.logprobs[:count])),
            prompt_logprobs=tuple(map(self._with_texts, delta.prompt_logprobs)),
            finish="stop" if text.stopped else delta.finish,
        )

    def _with_texts(self, logprobs: PositionLogprobs) -> PositionLogprobs:
        chosen, *top = (
            replace(token, text=self._tokenizer.token_text(token.token_id))
            for token in (logprobs.chosen, *logprobs.top)
        )
        return PositionLogprobs(chosen, tuple(top))


def _decoder(tokenizer: Any) -> Decode:
    """A tokeniser's `decode` without special tokens, as directly as it can be had.

    A replay pushes thousands of tokens through it while every stream of the replica waits.
    """
    from transformers import PreTrainedTokenizerFast

    if getattr(type(tokenizer), "_decode", None) is PreTrainedTokenizerFast._decode:
        decode = tokenizer.backend_tokenizer.decode  # what theirs comes to, at a quarter of the time
        return lambda ids: str(decode(ids, skip_special_tokens=True))
    return lambda ids: str(
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )


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
    """Keep transformers from importing torch, which tokenisers do not need: half of the start-up time."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def main() -> None:
    """Answer until the socket closes."""
    parser = argparse.ArgumentParser(description="The text process beside an engine.")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket")
    link = Link.inherited(parser.parse_args().fd)
    die_with_parent()
    link.beat()
    forgo_torch()
    try:
        _run(link)
    except LinkClosedError:
        return
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        reason = error.reason if isinstance(error, EngineError) else "INTERNAL"
        link.send(EngineFailed(reason, str(error), permanent=isinstance(error, ModelError)))
        raise SystemExit(1) from error


def _run(link: Link) -> None:
    start, *messages = link.receive()
    if not isinstance(start, StartText):
        raise EngineError("INTERNAL", f"expected StartText, got {type(start).__name__}")
    import_in_background("transformers")
    tokenizer = tokenizer_of(start)
    service = TextService(tokenizer)
    link.send(TextReady(tokenizer.longest_token_bytes()))
    while True:
        for message in messages:
            answer = service.handle(message)
            if answer is not None:
                link.send(answer)
        messages = list(link.receive())


if __name__ == "__main__":
    main()
