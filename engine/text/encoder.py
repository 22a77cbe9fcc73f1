"""Tokenises prompts in a thread, so that a long prompt does not delay the text of other streams.

`tokenizers` releases the interpreter lock while it encodes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from engine.errors import RequestError
from engine.ipc.link import LinkClosedError
from engine.ipc.wire import Encode, Encoded, NotEncoded
from engine.request import Refusal
from engine.text.prompt_length import too_many_tokens
from engine.text.tokenizer import Tokenizer

_MAX_ERROR = 200  # characters; a longer message may well quote the prompt

Answer = Callable[[Encoded | NotEncoded], None]


class Encoder:
    """Answers `Encode` messages one by one, in order.

    Owns: the prompts that are not tokenised yet, and the thread. Does not own: the tokeniser, the output of
    requests (`service`).

    Args:
        tokenizer: encodes in the encoder's thread only.
        answer: is called in the encoder's thread. The thread ends when it raises LinkClosedError.
    """

    def __init__(self, tokenizer: Tokenizer, answer: Answer) -> None:
        self._tokenizer, self._answer = tokenizer, answer
        self._waiting: OrderedDict[str, Encode] = OrderedDict()
        self._changed = threading.Condition()
        self._current = ""  # id of the request whose prompt is being tokenised, empty once cancelled
        threading.Thread(target=self._run, name="encode", daemon=True).start()

    def put(self, message: Encode) -> None:
        """Answer this message after all earlier ones."""
        with self._changed:
            self._waiting[message.id] = message
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """Drop a request: do not answer it, nor tokenise its prompt if that has not begun.

        Unknown ids are ignored.
        """
        with self._changed:
            self._waiting.pop(request_id, None)
            if self._current == request_id:
                self._current = ""

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                self._current, message = self._waiting.popitem(last=False)
            answer = encode(self._tokenizer, message)
            with self._changed:
                wanted, self._current = bool(self._current), ""
            if wanted:
                try:
                    self._answer(answer)
                except LinkClosedError:
                    return  # the main thread notices the same and ends the process


def encode(tokenizer: Tokenizer, message: Encode) -> Encoded | NotEncoded:
    """Tokenise the prompt and the bad words of a message. A failure refuses this request alone."""
    try:
        ids: tuple[int, ...] = ()
        if message.text is not None:
            ids = tokenizer.encode(message.text)
        elif message.messages:
            ids = tokenizer.encode_chat(message.messages)
        words = [ids for word in message.bad_words for ids in tokenizer.encode_word(word)]
    except RequestError as error:
        return NotEncoded(Refusal(message.id, error.reason, error.message))
    except BaseException as error:  # a panic in the tokeniser's Rust code is no Exception
        explanation = f"{type(error).__name__}: {error}"[:_MAX_ERROR]
        return NotEncoded(
            Refusal(message.id, "INVALID_ARGUMENT", f"the prompt cannot be tokenised: {explanation}")
        )
    if 0 < message.max_model_len <= len(ids):
        explanation = too_many_tokens(len(ids), message.max_model_len)
        return NotEncoded(Refusal(message.id, "PROMPT_TOO_LONG", explanation))
    return Encoded(message.id, ids, tuple(words))
