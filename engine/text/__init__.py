"""Text on both sides of the model: tokeniser, chat template, incremental detokeniser, stop strings."""
