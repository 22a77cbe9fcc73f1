"""Paged keys and values, and attention over them: the reference implementation.

Shapes: T tokens of a step, H query heads, K KV heads, G = H / K query heads per KV head, E head size,
B sequences of a group, Q queries per sequence, M = Q * G rows, L keys.

A query's result depends on its own sequence alone, to the last bit: not on the sequences beside it, nor
on how its prompt was cut into chunks, nor on whether it is a decode step or a recomputed prefill. Keys
are taken in tiles of `TILE`, in order, with an online softmax (Milakov & Gimelshein 2018); a tile that
lies wholly behind the query changes nothing; and the batch gives matrix products enough rows, since
BLAS libraries sum in another order for few.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy
import torch

TILE = 128


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Sequences that have the same number of queries in a step.

    rows_BQ: the step's rows that the queries are in. keys_BL: where each sequence's keys are in the
    cache, L a multiple of TILE, filled up with any place. mask_BML: true where a query must not look;
    rows beyond Q * G see the first key only.
    """

    rows_BQ: torch.Tensor
    keys_BL: torch.Tensor
    mask_BML: torch.Tensor


class KVCache:
    """Keys and values of this rank's layers: per layer [K, places, E], where a block is consecutive places.

    One block more than the pool has takes what the padding rows of a step write.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, kv_heads, (blocks + 1) * block_size, head_dim)
        self.keys_NKPE = _zeros(shape, dtype, device)
        self.values_NKPE = _zeros(shape, dtype, device)
        self.padding_place = blocks * block_size

    def write(self, layer: int, places_T: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor) -> None:
        """Store the keys and values of a step's tokens."""
        self.keys_NKPE[layer].index_copy_(1, places_T, k_TKE.transpose(0, 1))
        self.values_NKPE[layer].index_copy_(1, places_T, v_TKE.transpose(0, 1))


def attend(
    q_THE: torch.Tensor, cache: KVCache, layer: int, groups: tuple[AttentionGroup, ...]
) -> torch.Tensor:
    """Causal attention of a step's queries over the cache; [T, H, E]. Rows in no group are zero."""
    out_THE = torch.zeros_like(q_THE)
    for group in groups:
        out_BQHE = _attend_group(q_THE[group.rows_BQ], cache, layer, group)
        out_THE[group.rows_BQ] = out_BQHE.to(q_THE.dtype)
    return out_THE


def _attend_group(q_BQHE: torch.Tensor, cache: KVCache, layer: int, group: AttentionGroup) -> torch.Tensor:
    B, Q, H, E = q_BQHE.shape
    keys_KPE, values_KPE = cache.keys_NKPE[layer], cache.values_NKPE[layer]
    K = keys_KPE.shape[0]
    rows = Q * (H // K)
    # The query heads of a KV head become rows of one product, so that keys are never repeated.
    q_KBME = (q_BQHE.float() * E**-0.5).view(B, Q, K, H // K, E).permute(2, 0, 1, 3, 4).reshape(K, B, rows, E)
    M = group.mask_BML.shape[1]
    q_KBME = torch.nn.functional.pad(q_KBME, (0, 0, 0, M - rows))
    acc_KBME = torch.zeros_like(q_KBME)
    sum_KBM1 = q_KBME.new_zeros(K, B, M, 1)
    max_KBM1 = q_KBME.new_full((K, B, M, 1), -torch.inf)
    for start in range(0, group.keys_BL.shape[1], TILE):
        tile = slice(start, start + TILE)
        places = group.keys_BL[:, tile].reshape(-1)
        k_KBLE = keys_KPE.index_select(1, places).view(K, B, TILE, E).float()
        v_KBLE = values_KPE.index_select(1, places).view(K, B, TILE, E).float()
        scores_KBML = q_KBME @ k_KBLE.transpose(2, 3)
        scores_KBML.masked_fill_(group.mask_BML[:, :, tile], -torch.inf)
        # The first tile holds key 0, which every row sees, so the maximum is finite from then on.
        new_max_KBM1 = torch.maximum(max_KBM1, scores_KBML.amax(-1, keepdim=True))
        keep_KBM1 = torch.exp(max_KBM1 - new_max_KBM1)
        p_KBML = torch.exp(scores_KBML - new_max_KBM1)
        sum_KBM1 = sum_KBM1 * keep_KBM1 + p_KBML.sum(-1, keepdim=True)
        acc_KBME = acc_KBME * keep_KBM1 + p_KBML @ v_KBLE
        max_KBM1 = new_max_KBM1
    out_KBME = (acc_KBME / sum_KBM1)[:, :, :rows]
    return out_KBME.view(K, B, Q, H // K, E).permute(1, 2, 0, 3, 4).reshape(B, Q, H, E)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on a CPU, pages that are given memory when first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return torch.from_numpy(numpy.zeros(size, numpy.uint8)).view(dtype).view(shape)
