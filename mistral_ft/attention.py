"""Attention over records, or pages, laid end to end in one sequence: a token sees none but those of its own."""

import inspect
from itertools import pairwise

import torch
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED = "packed"
# What torch 2.10 and 2.11 do not have.
GROUPS_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
HAS_WINDOW = "window_size" in inspect.signature(varlen_attn).parameters


def packed_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens=None, max_length=None, **kwargs
):
    """One of transformers' attention functions: causal where `module.is_causal`, without mask and without dropout.

    Args:
        query: (1, heads, tokens, head size); key and value may have fewer heads.
        cu_seq_lens: int32 of shape (records + 1,): where each record starts, and at last the number of tokens.
        max_length: tokens of the longest record, or more.

    Returns:
        (1, tokens, heads, head size), and None for the attention weights.
    """
    if query.device.type != "cuda":
        bounds = cu_seq_lens.tolist()
        parts = [
            F.scaled_dot_product_attention(
                *(x[:, :, start:end] for x in (query, key, value)),
                is_causal=module.is_causal,
                scale=scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
            for start, end in pairwise(bounds)
            if end > start
        ]
        return torch.cat(parts, 2).transpose(1, 2), None
    query, key, value = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
    options = {"window_size": (-1, 0 if module.is_causal else -1)} if HAS_WINDOW else {"is_causal": module.is_causal}
    if key.shape[1] != query.shape[1]:
        if GROUPS_HEADS:
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    attended = varlen_attn(
        query, key, value, cu_seq_lens, cu_seq_lens, max_length, max_length, scale=scaling, **options
    )
    return attended[None], None


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
