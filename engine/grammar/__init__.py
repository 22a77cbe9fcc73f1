"""Structured outputs: which grammars are accepted, who compiles them, and the masks that enforce them."""
