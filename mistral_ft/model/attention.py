"""Attention over records, or pages, laid end to end in one sequence: a token sees none but those of its own."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED = "packed"
# torch 2.11 takes fewer heads of keys and values without being told.
TOLD: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def packed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    cu_seq_lens: Any = None,
    max_length: Any = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One of transformers' attention functions: causal where `module.is_causal`, without mask and without dropout.

    Args:
        query: (1, heads, tokens, head size); key and value may have fewer heads.
        cu_seq_lens: int32 of shape (records + 1,): where each record starts, and at last the number of tokens.
        max_length: tokens of the longest record, or more.
        sliding_window: of how many tokens, itself included, each sees the last; None: of all (Mistral-7B v0.1: 4096).

    Returns:
        (1, tokens, heads, head size), and None for the attention weights.
    """
    if query.device.type != "cuda":
        bounds = cu_seq_lens.tolist()
        parts = [
            F.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                **_mask(end - start, module.is_causal, sliding_window),
                scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
            for start, end in pairwise(bounds)
            if end > start
        ]
        return torch.cat(parts, 2).transpose(1, 2), None
    query, key, value = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
    window = (sliding_window - 1 if sliding_window else -1, 0 if module.is_causal else -1)
    attended: Any = varlen_attn(
        query, key, value, cu_seq_lens, cu_seq_lens, max_length, max_length, scale=scaling, window_size=window,
        **(TOLD if key.shape[1] != query.shape[1] else {}),
    )  # fmt: skip
    return attended[None], None


def _mask(length: int, is_causal: bool, sliding_window: int | None) -> dict[str, Any]:
    if not sliding_window or length <= sliding_window:
        return {"is_causal": is_causal}
    return {"attn_mask": torch.ones(length, length, dtype=torch.bool).tril().triu(1 - sliding_window)}


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)


@contextmanager
def attention(config: PretrainedConfig, name: str) -> Iterator[None]:
    """Have the layers of a config attend by the function of that name for a while."""
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before
