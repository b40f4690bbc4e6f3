"""Ending before a step that would spoil the weights, with the records that it is about."""

import math
from collections.abc import Sequence
from typing import NoReturn

from mistral_ft.data.collators import PackBatches, PackedDataset
from mistral_ft.distributed import gather
from mistral_ft.errors import UserError


def refuse_step(
    done: int, finite: Sequence[bool], batches: PackBatches, packed: PackedDataset, accumulation: int
) -> NoReturn:
    """Say that the loss or the gradient of a step is no finite number.

    Args:
        done: optimizer steps that were made.
        finite: whether the loss is a number, of each micro-batch of this step in this process.
        accumulation: micro-batches of a step.

    Raises:
        UserError: naming the records of the step; where a loss is no number, those of its micro-batches.
    """
    in_a_loss = any(gather(not all(finite)))
    start = done % math.ceil(len(batches) / accumulation) * accumulation
    turns = batches.turns(start, start + accumulation)
    suspect = [not (good and in_a_loss) for good in finite]
    mine = [pack for batch, named in zip(turns, suspect, strict=True) if named for pack in batch]
    numbers = sorted(number for packs in gather(mine) for pack in packs for number in packed.packs[pack])
    records = [packed.dataset.records[number] for number in numbers]
    named = ", ".join(f"{record.path}:{record.line}" for record in records[:8])
    more = f" and {len(records) - 8} more" if len(records) > 8 else ""
    raise UserError(
        f"the {'loss' if in_a_loss else 'gradient'} of step {done + 1} is no finite number, the step was not made; its "
        f"records: {named}{more}; look at them, or lower --learning_rate"
    )
