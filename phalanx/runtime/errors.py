"""Typed errors: the reason, and the gRPC status, HTTP status and retryability that belong to it."""

from __future__ import annotations

import grpc

DOMAIN = "phalanx.v1"

# reason: (gRPC status, HTTP status, retryable)
_KINDS: dict[str, tuple[grpc.StatusCode, int, bool]] = {
    "INVALID_ARGUMENT": (grpc.StatusCode.INVALID_ARGUMENT, 400, False),
    "EMPTY_PROMPT": (grpc.StatusCode.INVALID_ARGUMENT, 400, False),
    "PROMPT_TOO_LONG": (grpc.StatusCode.INVALID_ARGUMENT, 400, False),
    "MAX_TOKENS_TOO_LARGE": (grpc.StatusCode.INVALID_ARGUMENT, 400, False),
    "INVALID_TOKEN_ID": (grpc.StatusCode.INVALID_ARGUMENT, 400, False),
    "INVALID_GRAMMAR": (grpc.StatusCode.INVALID_ARGUMENT, 400, False),
    "GRAMMAR_TOO_COMPLEX": (grpc.StatusCode.INVALID_ARGUMENT, 400, False),
    "GRAMMAR_UNAVAILABLE": (grpc.StatusCode.UNIMPLEMENTED, 501, False),
    "NO_CHAT_TEMPLATE": (grpc.StatusCode.INVALID_ARGUMENT, 400, False),
    "NO_TOKENIZER": (grpc.StatusCode.INVALID_ARGUMENT, 400, False),
    "UNSUPPORTED": (grpc.StatusCode.INVALID_ARGUMENT, 400, False),
    "INVALID_MODEL": (grpc.StatusCode.INVALID_ARGUMENT, 400, False),
    "INVALID_LAYOUT": (grpc.StatusCode.INVALID_ARGUMENT, 400, False),
    "UNKNOWN_MODEL": (grpc.StatusCode.NOT_FOUND, 404, False),
    "UNKNOWN_DEPLOYMENT": (grpc.StatusCode.NOT_FOUND, 404, False),
    "UNKNOWN_REPLICA": (grpc.StatusCode.NOT_FOUND, 404, False),
    "UNKNOWN_WORKER": (grpc.StatusCode.NOT_FOUND, 404, False),
    "UNKNOWN_GATEWAY": (grpc.StatusCode.NOT_FOUND, 404, False),
    "UNKNOWN_REQUEST": (grpc.StatusCode.NOT_FOUND, 404, False),
    "ETAG_MISMATCH": (grpc.StatusCode.ABORTED, 409, False),
    "TAKEN_OVER": (grpc.StatusCode.ABORTED, 409, False),
    "DUPLICATE_REQUEST": (grpc.StatusCode.ALREADY_EXISTS, 409, False),
    "OVERLOADED": (grpc.StatusCode.RESOURCE_EXHAUSTED, 429, True),
    "CANCELLED": (grpc.StatusCode.CANCELLED, 499, False),
    "DEADLINE_EXCEEDED": (grpc.StatusCode.DEADLINE_EXCEEDED, 504, True),
    "MODEL_CHANGED": (grpc.StatusCode.ABORTED, 503, True),
    "ATTEMPTS_EXHAUSTED": (grpc.StatusCode.UNAVAILABLE, 503, True),
    "NO_REPLICA": (grpc.StatusCode.UNAVAILABLE, 503, True),
    "STALE_EPOCH": (grpc.StatusCode.FAILED_PRECONDITION, 503, True),
    "NOT_LEADER": (grpc.StatusCode.FAILED_PRECONDITION, 503, True),
    "UNREACHABLE": (grpc.StatusCode.UNAVAILABLE, 503, True),
    "STORE_UNAVAILABLE": (grpc.StatusCode.UNAVAILABLE, 503, True),
    "INTERNAL": (grpc.StatusCode.INTERNAL, 500, True),
}


class PhalanxError(Exception):
    """A failure with a `reason` for programs (a key of `_KINDS`) and a `message` for people.

    `param`: the name of the request field that is wrong. `retryable` overrides the table.
    """

    def __init__(
        self, reason: str, message: str, *, param: str | None = None, retryable: bool | None = None
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.param = param
        self.code, self.http_status, self.retryable = _KINDS.get(reason, _KINDS["INTERNAL"])
        if retryable is not None:
            self.retryable = retryable  # a newer peer may send a reason that is not in this table
