"""Trains a small Llama from scratch on a CPU, within a given time.

The model is the Llama of Hugging Face transformers, parameter names included, reduced to what
training needs. Matrices are trained by Muon (https://kellerjordan.github.io/posts/muon/), which
reaches on this scale in a minute what AdamW does not reach in three.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama. Eight heads on four KV heads and an even layer count allow TP4 and PP2."""

    vocab: int = 768
    hidden: int = 192
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    mlp: int = 512
    positions: int = 1024
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Size of one head."""
        return self.hidden // self.heads


@dataclass(frozen=True, slots=True)
class Progress:
    """How training goes: `fraction` of the time, mean `loss` in nats per token, tokens per second."""

    fraction: float
    loss: float
    tokens_per_s: float


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden))
        self.eps = shape.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv = shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)
        self.k_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.v_proj = nn.Linear(shape.hidden, kv, bias=False)
        self.o_proj = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[batch, tokens, hidden] to the same; cos and sin are [tokens, head_dim / 2]."""
        batch, tokens, _ = x.shape
        group = self.shape.heads // self.shape.kv_heads
        query, key, value = (
            projection(x).view(batch, tokens, -1, self.shape.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(
            _rotate(query, cos, sin),
            _rotate(key, cos, sin).repeat_interleave(group, 1),
            value.repeat_interleave(group, 1),
            is_causal=True,
        )
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions as transformers lays them out: the two halves of a head are the pairs."""
    low, high = x.chunk(2, -1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


class MLP(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.mlp, bias=False)
        self.down_proj = nn.Linear(shape.mlp, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One block: attention and feed-forward, each on a normed residual."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[batch, tokens, hidden] to the same."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Body(nn.Module):
    """Embedding, blocks and the last norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = RMSNorm(shape)
        frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = torch.outer(torch.arange(shape.positions).float(), frequencies)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [batch, tokens] to [batch, tokens, hidden]."""
        x: Tensor = self.embed_tokens(ids)
        cos, sin = (self.get_buffer(name)[: ids.shape[1]].to(x.dtype) for name in ("cos", "sin"))
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out


class Llama(nn.Module):
    """A causal language model."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = Body(shape)
        self.lm_head = nn.Linear(shape.hidden, shape.vocab, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * shape.layers) if residual else 1.0))

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [batch, tokens] to logits [batch, tokens, vocab]."""
        out: Tensor = self.lm_head(self.model(ids))
        return out


class Muon:
    """Muon: SGD with momentum whose update of each matrix is replaced by the nearest orthogonal one.

    Matrices of one shape are updated together, and shapes beside each other in `pool`.
    """

    MOMENTUM = 0.95

    def __init__(self, weights: list[nn.Parameter], lr: float, pool: Executor) -> None:
        shapes = sorted({tuple(weight.shape) for weight in weights})
        self._groups = [[w for w in weights if tuple(w.shape) == shape] for shape in shapes]
        self._momenta = [torch.zeros(len(g), *g[0].shape) for g in self._groups]
        self._lr = lr
        self._pool = pool

    def step(self, scale: float) -> None:
        """Update every weight from its gradient with the learning rate times `scale`."""
        update = functools.partial(self._update, self._lr * scale)
        list(self._pool.map(update, self._groups, self._momenta))

    @torch.no_grad()
    def _update(self, lr: float, group: list[nn.Parameter], momentum: Tensor) -> None:
        gradient = torch.stack([weight.grad for weight in group if weight.grad is not None])
        momentum.lerp_(gradient, 1 - self.MOMENTUM)
        update = _orthogonal(gradient.lerp_(momentum, self.MOMENTUM))
        rows, columns = update.shape[-2:]
        update *= -lr * math.sqrt(max(1.0, rows / columns))
        for weight, change in zip(group, update, strict=True):
            weight.add_(change)


def _orthogonal(x: Tensor) -> Tensor:
    """About U V^T for each x = U S V^T of [n, rows, columns], by five Newton-Schulz steps."""
    wide = x.shape[-1] >= x.shape[-2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


BATCH, TOKENS = 8, 192
_MUON_LR, _ADAM_LR = 0.02, 4e-3


def train(
    shape: Shape, data: Tensor, deadline: float, seed: int, report: Callable[[Progress], None]
) -> tuple[Llama, float]:
    """Train on a row of token ids until `deadline`, on time.monotonic's clock.

    Each core takes its part of the batch: operations of this size are too small to be split over cores.
    The learning rate falls with the time that is left, so that a slow machine gets a finished model too.

    Returns the model and the mean loss of the last steps in nats per token.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    cores = min(BATCH, len(os.sched_getaffinity(0)))
    model = Llama(shape)
    weights = dict(model.named_parameters())
    inner = [w for name, w in weights.items() if w.ndim == 2 and ".layers." in name]
    outer = [w for name, w in weights.items() if not (w.ndim == 2 and ".layers." in name)]
    adam = torch.optim.AdamW(outer, lr=_ADAM_LR, betas=(0.9, 0.95), fused=True)
    window = torch.arange(TOKENS + 1)
    gradients = functools.partial(_gradients, model, tuple(weights.values()), _fast_bfloat16())
    start, steps, mean = time.monotonic(), 0, math.log(shape.vocab)
    with ThreadPoolExecutor(cores) as pool:
        muon = Muon(inner, _MUON_LR, pool)
        while (now := time.monotonic()) < deadline:
            fraction = (now - start) / (deadline - start)
            scale = min(1.0, (steps + 1) / 10) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * fraction)))
            batch = data[torch.randint(len(data) - TOKENS, (BATCH, 1)) + window]
            losses, parts = zip(*pool.map(gradients, batch.chunk(cores)), strict=True)
            for weight, *part in zip(weights.values(), *parts, strict=True):
                weight.grad = sum(part[1:], part[0])
            muon.step(scale)
            for group in adam.param_groups:
                group["lr"] = _ADAM_LR * scale
            adam.step()
            steps += 1
            mean += (sum(losses) - mean) / min(steps, 20)
            report(Progress(fraction, mean, steps * BATCH * TOKENS / (time.monotonic() - start)))
    return model, mean


def _gradients(
    model: Llama, weights: tuple[Tensor, ...], bfloat16: bool, windows: Tensor
) -> tuple[float, tuple[Tensor, ...]]:
    """A part's share of the batch's mean loss, and its gradients. `windows` is [part, TOKENS + 1]."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = model(windows[:, :-1])
    total = F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    loss = total / (BATCH * TOKENS)
    return loss.item(), torch.autograd.grad(loss, weights)


def _fast_bfloat16() -> bool:
    """Whether this CPU multiplies in bfloat16; others emulate it, slower than float32."""
    try:
        with open("/proc/cpuinfo") as file:
            return any(line.startswith("flags") and "avx512_bf16" in line for line in file)
    except OSError:
        return False
