"""Text of a growing sequence of tokens: pieces that only ever append, cut at stop texts.

Pure: a tokeniser's `decode` comes in as a function. What a token's piece is depends on the tokens and
stop texts of the choice alone, so a replay cuts the text at the same places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_MOST_HELD_TOKENS = 16  # a character takes 4 bytes and so 4 tokens at most; more are no character


class Detokenizer:
    """Tokens to text, holding back bytes that are not a whole character yet.

    Decodes a short window: the tokens since the piece before last, so that a tokeniser sees the context
    that decides about spaces, and the cost per token does not grow.

    Args:
        decode: token ids to text, special tokens left out.
        context: a token before the first, in the light of which a leading space is kept.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context)
        self._said = len(self._window)  # tokens of the window whose text is out

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps none."""
        self._window.append(token_id)
        whole = self._decode(self._window)
        held = len(self._window) - self._said
        if whole.endswith(_REPLACEMENT) and held <= _MOST_HELD_TOKENS:
            return ""
        return self._advance(whole)

    def flush(self) -> str:
        """What is held back, broken characters as replacement characters."""
        return self._advance(self._decode(self._window))

    def _advance(self, whole: str) -> str:
        said = self._decode(self._window[: self._said])
        if len(whole) <= len(said) and len(self._window) - self._said <= _MOST_HELD_TOKENS:
            return ""  # a special token, or one that only changes what comes after it
        self._window = self._window[self._said :]
        self._said = len(self._window)
        return whole[len(said) :]


class StopCutter:
    """Holds back text that may be the beginning of a stop text, and cuts at the first that is whole."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(text for text in stop if text)
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop text was completed.

        Unless `may_stop`, stop texts that `text` completes count for nothing.
        """
        text = self._held + text
        first = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)
        if first is not None and may_stop:
            self._held = ""
            return text[:first], True
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What is held back."""
        held, self._held = self._held, ""
        return held


class ChoiceText:
    """One choice's text. `stopped` once a stop text has been completed after `min_tokens` tokens."""

    def __init__(self, detokenizer: Detokenizer, stop: Sequence[str], min_tokens: int = 0) -> None:
        self._detokenizer = detokenizer
        self._cutter = StopCutter(stop)
        self._too_early = min_tokens  # tokens to come that complete no stop text
        self._may_stop = True
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that this token makes visible."""
        self._may_stop = self._too_early == 0
        self._too_early -= not self._may_stop
        text, self.stopped = self._cutter.push(self._detokenizer.push(token_id), may_stop=self._may_stop)
        return text

    def flush(self) -> str:
        """The rest, when the choice ends without a stop text; the rest may still complete one."""
        text, self.stopped = self._cutter.push(self._detokenizer.flush(), may_stop=self._may_stop)
        return text if self.stopped else text + self._cutter.flush()


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
