"""Random numbers and attention inputs, for tests of kernels."""

from __future__ import annotations

import torch

from engine.config import BLOCK_SIZE
from engine.kernels.interface import AttentionInput, Kernels, KVCache, Rope

CPU = torch.device("cpu")


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Heads:
    """Attention over three sequences in scattered blocks, fed in steps of any shape."""

    def __init__(self, heads: int, kv_heads: int, size: int, length: int, device: torch.device = CPU) -> None:
        self.heads, self.kv_heads, self.size, self.length = heads, kv_heads, size, length
        blocks = -(-length // BLOCK_SIZE)
        order = torch.randperm(3 * blocks, generator=torch.Generator().manual_seed(5))
        self.tables = order.view(3, blocks).to(device, torch.int32)
        angles = torch.arange(length)[:, None] * 0.7 ** torch.arange(size // 2)
        self.rope = Rope(angles.cos().to(device), angles.sin().to(device))
        self.qkv = numbers(3, length, (heads + 2 * kv_heads) * size).to(device)

    def cache(self, kernels: Kernels) -> KVCache:
        return kernels.cache(2, self.kv_heads, self.size, self.tables.numel())

    def inputs(self, parts: list[tuple[int, int, int]]) -> AttentionInput:
        """The attention input of (sequence, start, end) parts."""
        sequences, row = [], 0
        for sequence, start, end in parts:
            sequences.append((sequence, row, end - start, start))
            row += end - start
        queries = [end - start for _, start, end in parts]
        device, whole = self.tables.device, torch.int32
        return AttentionInput(
            torch.cat([torch.arange(start, end) for _, start, end in parts]).to(device, whole),
            torch.cat([torch.full((end - start,), sequence) for sequence, start, end in parts]).to(
                device, whole
            ),
            torch.tensor(sequences, dtype=whole, device=device),
            self.tables,
            max(queries),
            queries.count(1),
        )

    def step(
        self, kernels: Kernels, cache: KVCache, parts: list[tuple[int, int, int]], **options: object
    ) -> list[torch.Tensor]:
        """Feed (sequence, start, end) parts; each one's rows."""
        inputs = self.inputs(parts)
        qkv = torch.cat([self.qkv[sequence, start:end] for sequence, start, end in parts])
        out = kernels.attend(qkv, cache, 1, inputs, self.rope, **options)  # type: ignore[arg-type]
        return list(out.split([end - start for _, start, end in parts]))
