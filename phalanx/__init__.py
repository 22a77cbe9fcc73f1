"""Phalanx serves large language models across many GPUs so that no client ever sees a GPU die."""
