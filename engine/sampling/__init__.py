"""Turns logits into tokens: logits processors, then the sample, then its log-probabilities."""
