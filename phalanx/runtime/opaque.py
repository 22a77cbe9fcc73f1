"""Opaque strings, such as cursors and page tokens: a client sends them back as it received them."""

from __future__ import annotations

import base64


def encode(content: bytes) -> str:
    """The content as unpadded base64url (RFC 4648), which is safe in URLs, headers and event ids."""
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def decode(text: str) -> bytes:
    """The content of a string that `encode` returned. Raises ValueError for every other string."""
    padded = text.encode("ascii") + b"=" * (-len(text) % 4)
    content = base64.b64decode(padded, altchars=b"-_", validate=True)
    if encode(content) != text:  # unused bits or padding: one content has one spelling
        raise ValueError("not a canonical opaque string")
    return content
