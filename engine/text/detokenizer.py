"""Text of a growing sequence of tokens: pieces that only ever append, cut at stop texts.

Pure: a tokeniser's `decode` is an argument. A token's piece depends on the tokens and stop texts of its
choice alone, so a replay cuts the text at the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MAX_PENDING_TOKENS = 16  # a character has at most 4 bytes, so 4 tokens; more tokens are no character


class Detokenizer:
    """Turns tokens into text, and holds back bytes that are not a whole character yet.

    Decodes a short window that begins with the tokens of the previous piece: some tokenisers write a space or
    not depending on the token before. The cost per token does not grow with the output.

    Args:
        decode: token ids to text, special tokens left out.
        context: tokens before the first; after a token, tokenisers do not strip a leading space.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context)
        self._emitted = len(self._window)  # tokens of the window whose text has been returned

    def push(self, token_id: int) -> str:
        """The text that this token completes; may be empty."""
        self._window.append(token_id)
        whole = self._decode(self._window)
        pending = len(self._window) - self._emitted
        if whole.endswith(_REPLACEMENT) and pending <= _MAX_PENDING_TOKENS:
            return ""
        return self._advance(whole)

    def flush(self) -> str:
        """The text held back; an incomplete character becomes a replacement character."""
        return self._advance(self._decode(self._window))

    def _advance(self, whole: str) -> str:
        emitted = self._decode(self._window[: self._emitted])
        if len(whole) <= len(emitted) and len(self._window) - self._emitted <= _MAX_PENDING_TOKENS:
            return ""  # a special token, or a token that only changes the text after it
        self._window = self._window[self._emitted :]
        self._emitted = len(self._window)
        return whole[len(emitted) :]


class StopCutter:
    """Cuts text at the first complete stop text, and holds back text that may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(text for text in stop if text)
        self._pending = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop text was completed.

        Without `may_stop`, stop texts that `text` completes are ignored.
        """
        text = self._pending + text
        first = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)
        if first is not None and may_stop:
            self._pending = ""
            return text[:first], True
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._pending = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The text held back."""
        pending, self._pending = self._pending, ""
        return pending


class ChoiceText:
    """One choice's text. `stopped` once a stop text has been completed after `min_tokens` tokens."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str], min_tokens: int = 0) -> None:
        self._detokenizer = detokenizer
        self._cutter = StopCutter(stop)
        self._min_tokens_left = min_tokens  # tokens to come that cannot complete a stop text
        self._may_stop = True
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that this token makes visible."""
        self._may_stop = self._min_tokens_left == 0
        self._min_tokens_left -= not self._may_stop
        text, self.stopped = self._cutter.push(self._detokenizer.push(token_id), may_stop=self._may_stop)
        return text

    def flush(self) -> str:
        """The rest of the text, when the engine ends the choice. The rest may complete a stop text."""
        text, self.stopped = self._cutter.push(self._detokenizer.flush(), may_stop=self._may_stop)
        return text if self.stopped else text + self._cutter.flush()


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
