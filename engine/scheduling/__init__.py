"""Decides each step: which sequences run, how many tokens, in which KV blocks. Pure, no torch."""
