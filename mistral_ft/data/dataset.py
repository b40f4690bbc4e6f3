"""From records to examples: checks of every page ahead of training, and the dataset."""

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from mistral_ft.data.image_fitter import to_patches
from mistral_ft.data.pages import open_image
from mistral_ft.data.processor import Processor
from mistral_ft.data.prompt.encoder import IGNORE_INDEX, PromptEncoder, encode_record, length_problem
from mistral_ft.data.records import Record
from mistral_ft.distributed import gather, rank, world_size
from mistral_ft.errors import RecordError, raise_all
from mistral_ft.progress import Progress


class Example(NamedTuple):
    """A record in numbers.

    Attributes:
        labels: as many as ids; `IGNORE_INDEX` where nothing is learned.
        pixel_values: of each page, float32 (patches, 3 * patch_size**2).
        image_sizes: each page's (height, width) in pixels.
    """

    input_ids: list[int]
    labels: list[int]
    pixel_values: Sequence[np.ndarray] = ()
    image_sizes: Sequence[tuple[int, int]] = ()


class RecordDataset:
    """Records as examples, read and encoded when asked for; without answers, nothing is learned."""

    def __init__(self, records: Sequence[Record], processor: Processor, with_answers: bool = True):
        self.records = records
        self.processor = processor
        self.with_answers = with_answers

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        """Raises RecordError if an image of the record cannot be opened."""
        record, fitter = self.records[index], self.processor.fitter
        grids, pixels = [], []
        try:
            for path in record.image_paths:
                assert fitter is not None  # who makes a dataset has asked `Processor.check_images`
                image = open_image(path, fitter)
                grids.append(fitter.grid(*image.size))
                pixels.append(fitter.pixels(image))
        except ValueError as error:
            raise record.error(str(error)) from None
        input_ids, labels = encode_record(self.processor.encoder, record, grids, self.with_answers)
        patches = [to_patches(page, fitter.patch_size, fitter.cell_size) for page in pixels if fitter]
        return Example(input_ids, labels, patches, [page.shape[1:] for page in pixels])


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
        text = record.text or ""
        parts = encoder.pieces(text, max_seq_length) if len(text.encode()) + 3 > max_seq_length else []
        if len(parts) < 2:
            cut.append(record)
            continue
        cut += [dataclasses.replace(record, piece=part) for part in parts]
        long, pieces = long + 1, pieces + len(parts)
    if long:
        print(f"{long:,} plain texts of more than {max_seq_length:,} tokens are cut into {pieces:,} pieces")
    return cut


def measure_records(records: Sequence[Record], processor: Processor, max_seq_length: int) -> list[RecordSize]:
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
    processor.check_images(records)
    fitter = processor.fitter

    def grid(path: str) -> tuple[int, int] | str:
        assert fitter is not None  # there are pages
        try:
            return fitter.grid(*open_image(path, fitter).size)
        except ValueError as error:
            return str(error)

    share = records[rank() :: world_size()]
    paths = list(dict.fromkeys(path for record in share for path in record.image_paths))
    # Pillow decodes outside Python's lock, so threads do.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        progress = Progress("checking", len(paths), "page")
        grids: dict[str, tuple[int, int]] = {}
        broken: dict[str, str] = {}
        try:
            for path, found in zip(paths, pool.map(grid, paths), strict=True):
                if isinstance(found, str):
                    broken[path] = found
                else:
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
        if reason := next((broken[path] for path in record.image_paths if path in broken), None):
            errors.append(record.error(reason))
            continue
        cells = [grids[path] for path in record.image_paths]
        try:
            input_ids, labels = encode_record(processor.encoder, record, cells, with_answer=True)
        except ValueError as error:
            errors.append(record.error(str(error)))
            continue
        patches = merged * sum(rows * columns for rows, columns in cells)
        sizes.append(RecordSize(len(input_ids), patches, len(labels) - labels.count(IGNORE_INDEX)))
        image_tokens = sum(rows * (columns + 1) for rows, columns in cells)
        if problem := length_problem(len(input_ids), image_tokens, len(cells), max_seq_length):
            errors.append(record.error(problem))
    found_by_all = gather((sizes, errors))
    raise_all(sorted((e for _, theirs in found_by_all for e in theirs), key=lambda e: (e.path, e.line)))
    everyones: list[Any] = [None] * len(records)
    for number, (share_sizes, _) in enumerate(found_by_all):
        everyones[number :: world_size()] = share_sizes
    return everyones
