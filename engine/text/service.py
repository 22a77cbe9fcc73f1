"""The text of live requests: prompts to tokens, and the tokens of steps to text."""

from __future__ import annotations

from dataclasses import replace

from engine.errors import EngineError
from engine.ipc.wire import Encode, Encoded, Forget, Message, Step
from engine.request import Delta, PositionLogprobs
from engine.text.detokenizer import ChoiceText, Detokenizer
from engine.text.encoder import Answer, Encoder
from engine.text.tokenizer import Tokenizer


class TextService:
    """Carries out the messages that `engine.ipc.wire` describes.

    Owns: per request, the detokeniser's state of its choices, from its `Encode` to its `Forget`.
    Does not own: tokens, the order of steps, prompts that are not tokenised yet (`encoder`).

    Args:
        tokenizer: decodes in the caller's thread and encodes in a thread of its own.
        answer: is called with every answer to `Encode`, in the caller's thread or in the encoder's.
    """

    def __init__(self, tokenizer: Tokenizer, answer: Answer) -> None:
        self._tokenizer, self._answer = tokenizer, answer
        self._encoder = Encoder(tokenizer, answer)
        self._choices: dict[str, list[ChoiceText]] = {}

    def handle(self, message: Message) -> None:
        """Handle a message of the worker. Raises EngineError on a type that is not for the text process."""
        match message:
            case Encode():
                self._choices[message.id] = [self._new_choice(message, choice) for choice in range(message.n)]
                if message.text is None and not message.messages and not message.bad_words:
                    self._answer(Encoded(message.id, ()))
                else:
                    self._encoder.put(message)
            case Forget(request_id):
                self._choices.pop(request_id, None)
                self._encoder.cancel(request_id)
            case _:
                raise EngineError("INTERNAL", f"unexpected {type(message).__name__}")

    def fill(self, step: Step) -> Step:
        """The step with text added. Requests that are over are unknown here: their deltas stay unchanged."""
        return replace(step, deltas=tuple(map(self._fill, step.deltas)))

    def _new_choice(self, message: Encode, choice: int) -> ChoiceText:
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
