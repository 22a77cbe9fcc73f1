"""The matcher over a grammar that xgrammar has compiled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.errors import RequestError
from engine.request import FinishReason


class XgrammarMatcher:
    """Implements `matcher.Matcher`.

    Args:
        compiled: the result of `GrammarCompiler.compile`.
        stop_token_ids: tokens that end the output. They are allowed only where the grammar may end.
        vocab_size: the model's.
        output: token ids that are generated already.

    Raises:
        RequestError: INVALID_GRAMMAR, when the output does not follow the grammar, or no token can follow.
    """

    def __init__(
        self, compiled: Any, stop_token_ids: Sequence[int], vocab_size: int, output: Sequence[int]
    ) -> None:
        import xgrammar

        self._matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=list(stop_token_ids))
        self._mask_1W = xgrammar.allocate_token_bitmask(1, vocab_size)
        self.finish: FinishReason | None = None
        for token_id in output:
            if not self._matcher.accept_token(token_id):
                raise RequestError("INVALID_GRAMMAR", "the prior output does not follow the grammar")
        self._update()
        if self.finish == "length" and not output:
            raise RequestError("INVALID_GRAMMAR", "no text of the model's tokens follows the grammar")

    def accept(self, token_id: int) -> None:
        """Append a token to the output."""
        if not self._matcher.accept_token(token_id):
            raise AssertionError(f"token {token_id} was sampled although the grammar does not allow it")
        self._update()

    def mask(self) -> bytes:
        """The token ids that are allowed next, as a bit mask."""
        return bytes(self._mask_1W.numpy())

    def _update(self) -> None:
        """Compute the mask and `finish`. If no token is allowed, the output ends here, incomplete."""
        if self._matcher.is_terminated():
            self.finish = "stop"
            return
        self._matcher.fill_next_token_bitmask(self._mask_1W)
        if not self._mask_1W.any():
            self.finish = "length"
