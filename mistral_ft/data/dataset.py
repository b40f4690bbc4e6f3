"""From records to batches: checks of every page ahead of training, the dataset and the collator."""

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from mistral_ft.data.image_fitter import TEXT_ONLY, ImageFitter, to_patches
from mistral_ft.data.pages import open_image
from mistral_ft.data.prompt.encoder import IGNORE_INDEX, PromptEncoder, encode_record, length_problem
from mistral_ft.data.records import Record
from mistral_ft.distributed import gather, rank, world_size
from mistral_ft.errors import RecordError, raise_all
from mistral_ft.progress import Progress


class RecordDataset:
    """Records as examples, read and encoded when asked for.

    An example is {"input_ids": [int], "labels": [int], "pixel_values": [float32 array (patches, 3 * patch_size**2)],
    "image_sizes": [(height, width)]}; labels are all `IGNORE_INDEX` if `with_answers` is False.
    """

    def __init__(
        self, records: Sequence[Record], encoder: PromptEncoder, fitter: ImageFitter | None, with_answers: bool = True
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
            images = [open_image(path, self.fitter) for path in record.image_paths]
            grids = [self.fitter.grid(*image.size) for image in images]
        except ValueError as error:
            raise record.error(str(error)) from None
        input_ids, labels = encode_record(self.encoder, record, grids, self.with_answers)
        pixels = [self.fitter.pixels(image) for image in images]
        return {
            "input_ids": input_ids,
            "labels": labels,
            "pixel_values": [to_patches(page, self.fitter.patch_size, self.fitter.cell_size) for page in pixels],
            "image_sizes": [page.shape[1:] for page in pixels],
        }


def check_images(records: Sequence[Record], fitter: ImageFitter | None) -> None:
    """Raises RecordError for the first record with an image if there is no fitter: the model reads text only."""
    if fitter is None and (record := next((record for record in records if record.image_paths), None)):
        raise record.error(TEXT_ONLY)


class RecordSize(NamedTuple):
    """How much of a record there is to compute: tokens, answer included; patches of its images; labels."""

    tokens: int
    patches: int
    labels: int


def cut_texts(records: Sequence[Record], encoder: PromptEncoder, max_seq_length: int) -> list[Record]:
    """The records, plain texts of more than so many tokens cut into pieces; nothing is lost, and it is said."""
    cut, long, pieces = [], 0, 0
    for record in records:
        # A token is at least one byte, but for <s>, </s> and the space that SentencePiece adds.
        may_be_long = record.text is not None and len(record.text.encode()) + 3 > max_seq_length
        parts = encoder.pieces(record.text, max_seq_length) if may_be_long else []
        if len(parts) < 2:
            cut.append(record)
            continue
        cut += [dataclasses.replace(record, piece=part) for part in parts]
        long, pieces = long + 1, pieces + len(parts)
    if long:
        print(f"{long:,} plain texts of more than {max_seq_length:,} tokens are cut into {pieces:,} pieces")
    return cut


def measure_records(
    records: Sequence[Record], encoder: PromptEncoder, fitter: ImageFitter | None, max_seq_length: int
) -> list[RecordSize]:
    """Open every page and encode every record once, ahead of training, so that nothing bad turns up hours later.

    Of several processes each does its share, and all know the whole.

    Args:
        max_seq_length: tokens that a record may have; records are refused, never cut.

    Returns:
        The size of each record.

    Raises:
        UserError: naming the records whose page cannot be opened, that are too long, or that the model's prompt has no
            place for.
    """
    check_images(records, fitter)

    def grid(path: str) -> tuple[int, int] | str:
        try:
            return fitter.grid(*open_image(path, fitter).size)
        except ValueError as error:
            return str(error)

    share = records[rank() :: world_size()]
    paths = list(dict.fromkeys(path for record in share for path in record.image_paths))
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
    sizes: list[RecordSize] = []
    merged = (fitter.cell_size // fitter.patch_size) ** 2 if fitter else 0
    for record in share:
        found = [grids[path] for path in record.image_paths]
        broken = next((result for result in found if isinstance(result, str)), None)
        if broken is not None:
            errors.append(record.error(broken))
            continue
        try:
            input_ids, labels = encode_record(encoder, record, found, with_answer=True)
        except ValueError as error:
            errors.append(record.error(str(error)))
            continue
        patches = merged * sum(rows * columns for rows, columns in found)
        sizes.append(RecordSize(len(input_ids), patches, len(labels) - labels.count(IGNORE_INDEX)))
        image_tokens = sum(rows * (columns + 1) for rows, columns in found)
        if problem := length_problem(len(input_ids), image_tokens, len(found), max_seq_length):
            errors.append(record.error(problem))
    found_by_all = gather((sizes, errors))
    raise_all(sorted((e for _, found in found_by_all for e in found), key=lambda e: (e.path, e.line)))
    everyones: list[Any] = [None] * len(records)
    for number, (found, _) in enumerate(found_by_all):
        everyones[number :: world_size()] = found
    return everyones


class PackedDataset:
    """Records in packs: item i is the list of the examples of pack i.

    Args:
        packs: the numbers of each pack's records.
    """

    def __init__(self, dataset: RecordDataset, packs: Sequence[Sequence[int]]):
        self.dataset = dataset
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        return [self.dataset[number] for number in self.packs[index]]


class PackBatches(Sampler[list[int]]):
    """Batches of packs in an order drawn anew for each epoch, each process those of its turn.

    The order is that of one process with the same number of packs to a step. Where the packs do not come out even, the
    last turns are empty batches: no pack is trained twice to fill them up, and none is left out.

    Args:
        packs: how many there are.
        batch_size: packs of a batch.
        drop_last: leave out what does not fill a turn of every process, instead.

    Attributes:
        epoch: the one whose order is meant; who iterates sets it.
    """

    def __init__(self, packs: int, batch_size: int, seed: int, drop_last: bool = False):
        self.packs, self.batch_size, self.seed, self.drop_last = packs, batch_size, seed, drop_last
        self.epoch = 0

    def __len__(self) -> int:
        turns = self.packs / (self.batch_size * world_size())
        return math.floor(turns) if self.drop_last else math.ceil(turns)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.turns(0, len(self)))

    def turns(self, start: int, end: int) -> list[list[int]]:
        """This process's batches of some turns of the epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.packs, generator=generator).tolist()
        places = [(turn * world_size() + rank()) * self.batch_size for turn in range(start, min(end, len(self)))]
        return [order[place : place + self.batch_size] for place in places]


def _images(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Nothing, or {"pixel_values": float32 (patches, ...), "image_sizes": [(height, width)]}, in the records' order."""
    sizes = [size for example in examples for size in example["image_sizes"]]
    if not sizes:
        return {}
    patches = np.concatenate([page for example in examples for page in example["pixel_values"]])
    # Sizes stay numbers: the tower needs them on the CPU, and reading them back from the GPU would wait for it.
    return {"pixel_values": torch.from_numpy(patches), "image_sizes": sizes}


class TrainingCollator:
    """Packs of examples to one sequence, record after record, without padding between them.

    Returns {"input_ids", "position_ids", "labels": int64 (1, tokens), "label_positions": int64 (labels,), the positions
    whose next token is a label, "cu_seq_lens": int32 (records + 1,), "max_length": int, "num_tokens": int} and, if
    there is any image, what `RecordDataset` says of "pixel_values" and "image_sizes", all pages joined. Of no packs at
    all it makes a sequence without labels.

    Args:
        pad_id: id that fills up.
        length: tokens of a sequence, filled up by a record of its own that carries no label; None fills up nothing.
        max_records: records, the fill included, that `cu_seq_lens` has room for when `length` is given.
    """

    def __init__(self, pad_id: int, length: int | None = None, max_records: int | None = None):
        self.pad_id = pad_id
        self.length = length
        self.max_records = max_records

    def __call__(self, packs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
        examples = [example for pack in packs for example in pack]
        rows = [(example["input_ids"], example["labels"]) for example in examples]
        num_tokens = sum(len(ids) for ids, _ in rows)
        length = self.length or max(1, num_tokens)
        if num_tokens < length:
            fill = length - num_tokens
            rows.append(([self.pad_id] * fill, [IGNORE_INDEX] * fill))
        lengths = [len(ids) for ids, _ in rows]
        bounds = np.cumsum([0, *lengths])
        if self.max_records is not None:
            # Records of no tokens: shapes that never change are compiled once.
            bounds = np.pad(bounds, (0, self.max_records + 1 - len(bounds)), mode="edge")
        labels = np.concatenate([labels for _, labels in rows])
        return {
            "input_ids": torch.tensor([[number for ids, _ in rows for number in ids]]),
            "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
            "labels": torch.from_numpy(labels)[None],
            "label_positions": torch.from_numpy(np.flatnonzero(labels[1:] != IGNORE_INDEX)),
            "cu_seq_lens": torch.from_numpy(bounds.astype(np.int32)),
            "max_length": self.length or max(lengths),
            "num_tokens": num_tokens,
            **_images(examples),
        }


class PromptCollator:
    """Examples to one batch for generation, padded on the left: it goes on at the right edge.

    Returns {"input_ids", "attention_mask": int64 (batch, tokens)} and, if there is any image, "pixel_values" and
    "image_sizes" as `TrainingCollator` does.

    Args:
        pad_id: id that fills up `input_ids`; it carries no attention.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        rows = [example["input_ids"] for example in examples]
        length = max(map(len, rows))
        return {
            "input_ids": torch.tensor([[self.pad_id] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
            **_images(examples),
        }
