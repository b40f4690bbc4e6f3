"""From records to batches: checks of every page ahead of training, the dataset and the collator."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mistral_ft.errors import RecordError, raise_all
from mistral_ft.images import ImageFitter, open_image
from mistral_ft.progress import Progress
from mistral_ft.prompt import IGNORE_INDEX, PromptEncoder
from mistral_ft.records import Record


class RecordDataset:
    """Records as examples, read and encoded when asked for.

    An example is {"input_ids": [int], "labels": [int], "pixel_values": [float32 array (3, height, width)]}; labels
    are all `IGNORE_INDEX` if `with_answers` is False.
    """

    def __init__(
        self, records: Sequence[Record], encoder: PromptEncoder, fitter: ImageFitter, with_answers: bool = True
    ):
        self.records = records
        self.encoder = encoder
        self.fitter = fitter
        self.with_answers = with_answers

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises RecordError if an image of the record cannot be opened."""
        record = self.records[index]
        try:
            images = [open_image(path) for path in record.image_paths]
            grids = [self.fitter.grid(*image.size) for image in images]
        except ValueError as error:
            raise record.error(str(error)) from None
        input_ids, labels = encode_record(self.encoder, record, grids, self.with_answers)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "pixel_values": [self.fitter.pixels(image) for image in images],
        }


def encode_record(
    encoder: PromptEncoder, record: Record, grids: Sequence[tuple[int, int]], with_answer: bool
) -> tuple[list[int], list[int]]:
    """`input_ids` and `labels` of a record, with its expected answer or without."""
    expected = record.expected if with_answer else None
    return encoder.encode(record.messages, grids, expected, record.data.get("tools"))


def count_tokens(
    records: Sequence[Record], encoder: PromptEncoder, fitter: ImageFitter, max_seq_length: int
) -> list[int]:
    """Open every page and encode every record once, ahead of training, so that nothing bad turns up hours later.

    Args:
        max_seq_length: tokens that a record may have; records are refused, never cut.

    Returns:
        The number of tokens of each record, answer included.

    Raises:
        UserError: naming the records whose page cannot be opened or that are too long.
    """

    def grid(path: Path) -> tuple[int, int] | str:
        try:
            return fitter.grid(*open_image(path).size)
        except ValueError as error:
            return str(error)

    paths = list(dict.fromkeys(path for record in records for path in record.image_paths))
    # Pillow decodes outside Python's lock, so threads do.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        progress = Progress("checking", len(paths), "page")
        grids = {}
        try:
            for path, found in zip(paths, pool.map(grid, paths), strict=True):
                grids[path] = found
                progress.update()
        except BaseException:  # Ctrl-C waits for the pages under way, not for all
            pool.shutdown(cancel_futures=True)
            raise
        progress.close()

    errors: list[RecordError] = []
    lengths = []
    for record in records:
        found = [grids[path] for path in record.image_paths]
        broken = next((result for result in found if isinstance(result, str)), None)
        if broken is not None:
            errors.append(record.error(broken))
            continue
        lengths.append(len(encode_record(encoder, record, found, with_answer=True)[0]))
        if lengths[-1] > max_seq_length:
            image_tokens = sum(rows * (columns + 1) for rows, columns in found)
            errors.append(
                record.error(
                    f"{lengths[-1]} tokens ({image_tokens} of them for {len(found)} images) are more than "
                    f"--max_seq_length {max_seq_length}; raise it, or shorten the record"
                )
            )
    raise_all(errors)
    return lengths


class Collator:
    """Examples to one padded batch.

    Returns {"input_ids", "attention_mask", "labels": int64 (batch, tokens)} and, if there is any image,
    {"pixel_values": float32 (images, 3, height, width), zero-padded on the right and below, "image_sizes": int64
    (images, 2)}, images in the order of their records.

    Args:
        pad_id: id that fills up `input_ids`; it carries no attention and no label.
        padding_side: "right" for training, "left" for generation, which goes on at the right edge.
    """

    def __init__(self, pad_id: int, padding_side: str = "right"):
        assert padding_side in ("left", "right")
        self.pad_id = pad_id
        self.padding_side = padding_side

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {
            "input_ids": self._pad([e["input_ids"] for e in examples], self.pad_id),
            "attention_mask": self._pad([[1] * len(e["input_ids"]) for e in examples], 0),
            "labels": self._pad([e["labels"] for e in examples], IGNORE_INDEX),
        }
        pages = [page for example in examples for page in example["pixel_values"]]
        if pages:
            sizes = [page.shape[1:] for page in pages]
            stacked = np.zeros((len(pages), 3, *np.max(sizes, axis=0)), np.float32)
            for place, page, (height, width) in zip(stacked, pages, sizes, strict=True):
                place[:, :height, :width] = page
            batch["pixel_values"] = torch.from_numpy(stacked)
            batch["image_sizes"] = torch.tensor(sizes)
        return batch

    def _pad(self, rows: list[list[int]], value: int) -> torch.Tensor:
        length = max(map(len, rows))
        fill = [[value] * (length - len(row)) for row in rows]
        pairs = zip(rows, fill, strict=True)
        return torch.tensor([row + pad if self.padding_side == "right" else pad + row for row, pad in pairs])
