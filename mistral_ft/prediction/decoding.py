"""Greedy decoding of many records at once: prompts laid end to end, then one token of every record per step."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mistral_ft.data.collators import Batch
from mistral_ft.model.attention import attention, packed_attention

CACHED = "cached"
# The cache's length is a multiple of it, so that batches of like length share one.
CACHE_STEP = 256


def head_size(config: Any) -> int:
    """Numbers that a head of a text model has; Mistral-7B's config.json leaves it to be derived."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class KeyValueCache:
    """Keys and values of every layer for a batch of records.

    Attributes:
        keys, values: (layers, records, heads, length, head size).
        lengths: int64 (records,): how many tokens of each record are there.
        write_to: while prompts are read, the record and position of each token: two int64 tensors; else None.
    """

    def __init__(self, config: Any, records: int, length: int, dtype: torch.dtype, device: torch.device):
        shape = (config.num_hidden_layers, records, config.num_key_value_heads, length, head_size(config))
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(records, dtype=torch.int64, device=device)
        self.write_to: tuple[torch.Tensor, torch.Tensor] | None = None

    @staticmethod
    def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
        """What one token of one record takes in all layers."""
        return 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(config) * dtype.itemsize


def cached_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    cache: Any = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """One of transformers' attention functions: of prompts laid end to end, or of one new token of each record.

    Args:
        query: (1, heads, tokens, head size) for prompts, else (records, heads, 1, head size).
        cache: a `KeyValueCache`, which gets the new keys and values.
        sliding_window: as in `packed_attention`.

    Returns:
        (batch, tokens, heads, head size), and None for the attention weights.
    """
    keys, values = cache.keys[module.layer_idx], cache.values[module.layer_idx]
    if cache.write_to is not None:
        records, positions = cache.write_to
        keys[records, :, positions] = key[0].transpose(0, 1)
        values[records, :, positions] = value[0].transpose(0, 1)
        kwargs |= {"scaling": scaling, "sliding_window": sliding_window}
        return packed_attention(module, query, key, value, None, **kwargs)
    records = torch.arange(len(query), device=query.device)
    keys[records, :, cache.lengths] = key[:, :, 0]
    values[records, :, cache.lengths] = value[:, :, 0]
    # All queries of a head of keys at once: (records, key heads, queries a head, head size).
    grouped = query.view(len(query), keys.shape[1], -1, query.shape[-1])
    scores = (grouped @ keys.transpose(2, 3)).float() * scaling
    places, last = torch.arange(keys.shape[2], device=query.device), cache.lengths[:, None]
    unused = places > last
    if sliding_window:
        unused |= places <= last - sliding_window
    weights = scores.masked_fill(unused[:, None, None], -torch.inf).softmax(-1).to(values.dtype)
    return (weights @ values).reshape(len(query), 1, -1, query.shape[-1]), None


ALL_ATTENTION_FUNCTIONS.register(CACHED, cached_attention)


class GreedyDecoder:
    """Answers prompts with the likeliest token at each step.

    On a GPU a step is a CUDA graph: launched one by one, its kernels would take three times as long.

    Args:
        model: the whole model, to which nothing else may happen meanwhile.
        eos: the id that ends an answer.
        graphs: whether a GPU gets CUDA graphs. While one is recorded, no other thread may talk to the GPU, as those of
            a training's data loader do.
    """

    def __init__(self, model: Any, eos: int, graphs: bool = True):
        self.model, self.eos, self.graphs = model, eos, graphs
        self.config = model.config.get_text_config()
        self.device: torch.device = model.device
        self.cache: KeyValueCache | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def decode(
        self, prompts: Sequence[Batch], max_new_tokens: int, stopped: Callable[[], bool] = lambda: False
    ) -> tuple[list[list[int]], list[list[float]]]:
        """New tokens of each prompt, the end token included, and their log-probabilities.

        Args:
            prompts: groups of prompts as `TrainingCollator` lays them out; together they are one batch.
            stopped: asked before each token; if it says yes, the answers stay as far as they are.
        """
        bounds = [prompt.cu_seq_lens.tolist() for prompt in prompts]
        lengths = [end - start for bound in bounds for start, end in pairwise(bound)]
        with attention(self.config, CACHED):
            self._prepare(len(lengths), max(lengths) + max_new_tokens)
            self._read_prompts(prompts, lengths)
            tokens, log_probs = [self.tokens.clone()], [self.log_probs.clone()]
            ended = self.tokens == self.eos
            while len(tokens) < max_new_tokens and not ended.all() and not stopped():
                self.graph.replay() if self.graph else self._step()
                tokens.append(self.tokens.clone())
                log_probs.append(self.log_probs.clone())
                ended |= self.tokens == self.eos
        ids, probs = torch.stack(tokens, 1).tolist(), torch.stack(log_probs, 1).tolist()
        return cut_at(self.eos, ids, probs)

    def _prepare(self, records: int, length: int) -> None:
        """Make room, and the graph of a step, unless those of the last batch will do."""
        length = -(-length // CACHE_STEP) * CACHE_STEP
        # Only an equal one will do: sums over a longer cache may be rounded differently, and what a batch answers must
        # not depend on the batches before it, which a run that is continued has not seen.
        if self.cache is not None and self.cache.keys.shape[1:4:2] == (records, length):
            self.cache.lengths.zero_()
            return
        self.cache = self.graph = None  # frees the memory before more is taken
        self.cache = KeyValueCache(self.config, records, length, self.model.dtype, self.device)
        self.tokens = torch.zeros(records, dtype=torch.int64, device=self.device)
        self.log_probs = torch.zeros(records, device=self.device)
        if self.device.type == "cuda" and self.graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step()  # libraries set themselves up in their first calls, which a graph cannot hold
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self.graph = graph
            self.cache.lengths.zero_()

    def _read_prompts(self, prompts: Sequence[Batch], lengths: list[int]) -> None:
        """Fill the cache and find the first token of each answer."""
        assert self.cache is not None  # it is prepared
        first, ends = 0, []
        for prompt in prompts:
            batch = prompt.to(self.device)
            counts = batch.cu_seq_lens.diff()
            records = torch.arange(first, first + len(counts), device=self.device)
            self.cache.write_to = (records.repeat_interleave(counts), batch.position_ids[0])
            hidden = self.model.model(**batch.model_inputs(), use_cache=False, cache=self.cache).last_hidden_state
            ends.append(hidden[0, batch.cu_seq_lens[1:] - 1])
            first += len(counts)
        self.cache.write_to = None
        self.cache.lengths.copy_(torch.tensor(lengths))
        self._choose(torch.cat(ends))

    def _step(self) -> None:
        """Read the last token of each record and choose the next, in place."""
        assert self.cache is not None
        outputs = self.model.model(
            input_ids=self.tokens[:, None],
            position_ids=self.cache.lengths[:, None],
            use_cache=False,
            cache=self.cache,
        )
        # A record whose answer has ended stays where it is.
        self.cache.lengths.add_(1).clamp_(max=self.cache.keys.shape[3] - 1)
        self._choose(outputs.last_hidden_state[:, 0])

    def _choose(self, hidden: torch.Tensor) -> None:
        logits = self.model.lm_head(hidden).float()
        best = logits.max(-1)
        self.tokens.copy_(best.indices)
        self.log_probs.copy_(best.values - logits.logsumexp(-1))


def cut_at(eos: int, ids: list[list[int]], log_probs: list[list[float]]) -> tuple[list[list[int]], list[list[float]]]:
    """Each row up to its first end token, that included, and the log-probabilities likewise."""
    ends = [row.index(eos) + 1 if eos in row else len(row) for row in ids]
    cut_ids = [row[:end] for row, end in zip(ids, ends, strict=True)]
    return cut_ids, [row[:end] for row, end in zip(log_probs, ends, strict=True)]
