"""The loss where there is something to learn: logits are computed at label positions only."""

from collections.abc import Iterator
from typing import Any

import torch

from mistral_ft.data.collators import Batch

# Labels whose logits are there at once: 1 GiB of them with 131,072 ids.
LABELS_AT_ONCE = 2048


def label_chunks(model: Any, batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states whose next token is a label, float (labels, hidden size), and these labels, in chunks.

    Elsewhere nobody needs logits: with 131,072 ids they would be the largest tensor of all.

    Args:
        model: a whole one, with `lm_head`; its core runs once.
        batch: on the model's device.
    """
    hidden = model.model(**batch.model_inputs(), use_cache=False).last_hidden_state[0, batch.label_positions]
    targets = batch.labels[0, batch.label_positions + 1]
    return zip(hidden.split(LABELS_AT_ONCE), targets.split(LABELS_AT_ONCE), strict=True)
