"""From examples to batches."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from mistral_ft.data.dataset import Example, RecordDataset
from mistral_ft.data.packing import prompt_groups
from mistral_ft.data.prompt.encoder import IGNORE_INDEX
from mistral_ft.distributed import rank, world_size


class PackedDataset(Dataset[list[Example]]):
    """Records in packs: item i is the list of the examples of pack i.

    Args:
        packs: the numbers of each pack's records.
    """

    def __init__(self, dataset: RecordDataset, packs: Sequence[Sequence[int]]):
        self.dataset = dataset
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> list[Example]:
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


def _images(examples: Sequence[Example]) -> dict[str, Any]:
    """Nothing, or `pixel_values` and `image_sizes` as in `Batch`, in the records' order."""
    sizes = [size for example in examples for size in example.image_sizes]
    if not sizes:
        return {}
    patches = np.concatenate([page for example in examples for page in example.pixel_values])
    # Sizes stay numbers: the tower needs them on the CPU, and reading them back from the GPU would wait for it.
    return {"pixel_values": torch.from_numpy(patches), "image_sizes": sizes}


@dataclass
class Batch:
    """Records laid end to end in one sequence.

    Attributes:
        input_ids, position_ids, labels: int64 of shape (1, tokens).
        label_positions: int64 (labels,): the positions whose next token is a label.
        cu_seq_lens: int32 (records + 1,): where each record starts, and at last the number of tokens.
        max_length: tokens of the longest record, or more.
        num_tokens: tokens of records, without those that fill up.
        pixel_values: float32 (patches, 3 * patch_size**2) of all images; None without any.
        image_sizes: each image's (height, width) in pixels.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    label_positions: torch.Tensor
    cu_seq_lens: torch.Tensor
    max_length: int
    num_tokens: int
    pixel_values: torch.Tensor | None = None
    image_sizes: list[tuple[int, int]] | None = None

    def model_inputs(self) -> dict[str, Any]:
        """What a model is called with."""
        names = ["input_ids", "position_ids", "cu_seq_lens", "max_length"]
        names += ["pixel_values", "image_sizes"] if self.pixel_values is not None else []
        return {name: getattr(self, name) for name in names}

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; copies from pinned memory need not be waited for."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in pinned memory: what a DataLoader calls."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        changed: dict[str, Any] = {n: change(x) if isinstance(x, torch.Tensor) else x for n, x in vars(self).items()}
        return Batch(**changed)


class TrainingCollator:
    """Packs of examples to one sequence, record after record, without padding between them.

    Of no packs at all it makes a sequence without labels.

    Args:
        pad_id: id that fills up.
        length: tokens of a sequence, filled up by a record of its own that carries no label; None fills up nothing.
        max_records: records, the fill included, that `cu_seq_lens` has room for when `length` is given.
    """

    def __init__(self, pad_id: int, length: int | None = None, max_records: int | None = None):
        self.pad_id = pad_id
        self.length = length
        self.max_records = max_records

    def __call__(self, packs: Sequence[Sequence[Example]]) -> Batch:
        examples = [example for pack in packs for example in pack]
        rows = [(example.input_ids, example.labels) for example in examples]
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
        return Batch(
            input_ids=torch.tensor([[number for ids, _ in rows for number in ids]]),
            position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
            labels=torch.from_numpy(labels)[None],
            label_positions=torch.from_numpy(np.flatnonzero(labels[1:] != IGNORE_INDEX)),
            cu_seq_lens=torch.from_numpy(bounds.astype(np.int32)),
            max_length=self.length or max(lengths),
            num_tokens=num_tokens,
            **_images(examples),
        )


class PromptCollator:
    """Examples to one batch for generation, padded on the left: it goes on at the right edge.

    Returns {"input_ids", "attention_mask": int64 (batch, tokens)} and, if there is any image, "pixel_values" and
    "image_sizes" as in `Batch`.

    Args:
        pad_id: id that fills up `input_ids`; it carries no attention.
    """

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        rows = [example.input_ids for example in examples]
        length = max(map(len, rows))
        return {
            "input_ids": torch.tensor([[self.pad_id] * (length - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
            **_images(examples),
        }


class GroupCollator:
    """Examples to groups of prompts laid end to end, as `GreedyDecoder` takes them."""

    def __init__(self, pad_id: int):
        self.collate = TrainingCollator(pad_id)

    def __call__(self, examples: list[Example]) -> list[Batch]:
        lengths = [len(example.input_ids) for example in examples]
        return [self.collate([[examples[row] for row in group]]) for group in prompt_groups(lengths)]
