"""Which records are answered together."""

import os
import sys
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import AutoConfig

from mistral_ft.data.packing import MAX_PROMPT_TOKENS
from mistral_ft.data.processor import Processor
from mistral_ft.data.prompt.encoder import encode_record
from mistral_ft.data.records import Record
from mistral_ft.model.device import limit_gib
from mistral_ft.model.size import weight_bytes
from mistral_ft.prediction.decoding import KeyValueCache
from mistral_ft.prediction.trained_model import ModelFolders

# Records answered at once, at most, where the batch size is chosen. More of them share a sweep over the weights, but
# wait for the longest answer among them.
MOST_ROWS = 32


ROWS_ON_CPU = 8


# Padded tokens of a batch for transformers' generate: on the 24B they take about 15 GiB beside the weights' 45.
MAX_PADDED_TOKENS = 32768


def page_lengths(records: Sequence[Record], processor: Processor) -> list[int]:
    """Tokens of each record's prompt, from the files' headers alone. A page that has none to read counts as nothing.

    Raises:
        UserError: naming the first record that shows an image to a model that reads text only, or that the model's
            prompt has no place for.
    """
    processor.check_images(records)

    def length(record: Record) -> int:
        try:
            grids = processor.grids(record.image_paths)
        except ValueError:
            return 0  # the row will get an error when its turn comes
        try:
            return len(encode_record(processor.encoder, record, grids, with_answer=False)[0])
        except ValueError as error:
            raise record.error(str(error)) from None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(length, records))


def plan_batches(lengths: Sequence[int], batch_size: int, most_tokens: int) -> list[list[int]]:
    """Row numbers in batches of like length, the longest first, so that what does not fit fails at once.

    A batch has at most `batch_size` rows and, if all were as long as its longest, `most_tokens` tokens, but always one
    row.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        full = batches and (
            len(batches[-1]) == batch_size or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > most_tokens
        )
        if not batches or full:
            batches.append([])
        batches[-1].append(index)
    return batches


def plan(
    lengths: Sequence[int],
    folders: ModelFolders,
    device: torch.device,
    max_new_tokens: int,
    batch_size: int | None = None,
    num_beams: int | None = None,
    texts: Set[int] = frozenset(),
) -> list[list[int]]:
    """Batches for these prompts.

    Args:
        lengths: tokens of each prompt.
        folders: of the model.
        batch_size: rows of a batch; None: as many as the GPU has room for, up to `MOST_ROWS`.
        num_beams: beams of transformers' generate, where that is used.
        texts: rows of plain text, which are read and not answered: they have batches of their own.
    """
    if texts:
        asked = [row for row in range(len(lengths)) if row not in texts]
        read = sorted(texts)
        prompts = [lengths[row] for row in asked]
        answered = plan(prompts, folders, device, max_new_tokens, batch_size, num_beams) if asked else []
        reading = plan_batches([lengths[row] for row in read], batch_size or MOST_ROWS, MAX_PROMPT_TOKENS)
        return [[rows[k] for k in batch] for rows, batches in ((asked, answered), (read, reading)) for batch in batches]
    whole = [length + max_new_tokens for length in lengths]
    if num_beams is not None:
        return plan_batches(whole, batch_size or ROWS_ON_CPU, MAX_PADDED_TOKENS // num_beams)
    if device.type != "cuda" or batch_size is not None:
        return plan_batches(whole, batch_size or ROWS_ON_CPU, sys.maxsize)
    return plan_batches(whole, MOST_ROWS, cache_tokens(folders, device, max(lengths)))


def cache_tokens(folders: ModelFolders, device: torch.device, longest: int) -> int:
    """Tokens, of prompts and answers, whose keys and values the GPU has room for beside the weights.

    Args:
        folders: of the model; only its config.json is read.
        longest: tokens of the longest prompt.
    """
    text = AutoConfig.from_pretrained(folders.folder).get_text_config()
    free = limit_gib(device) * 2**30 - weight_bytes(folders.folder, folders.rounding)
    return tokens_that_fit(free, text, longest)


def tokens_that_fit(free: float, text: Any, longest: int) -> int:
    """Tokens whose keys and values go into `free` bytes of GPU memory beside the prompts at work.

    Args:
        text: the text model's config.
        longest: tokens of the longest prompt.
    """
    # Prompts at work: five tensors as wide as the MLP, eight as wide as the hidden state; 3 GiB for the rest.
    width = 2 * (5 * text.intermediate_size + 8 * text.hidden_size)
    at_work = max(longest, MAX_PROMPT_TOKENS) * width + 3 * 2**30
    return max(0, int(free - at_work)) // KeyValueCache.bytes_per_token(text, torch.bfloat16)
