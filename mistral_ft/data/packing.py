"""Which records share a sequence, so that hardly any of its tokens is empty."""

import bisect
import math
import random
from collections.abc import Iterator, Sequence

# Prompt tokens that go through the model at once: enough to keep the GPU busy, and they need 7 GiB on the 24B.
MAX_PROMPT_TOKENS = 16384

# Sequence lengths are multiples of it: the tiles of matrix products on GPUs are 128 or 256 rows high.
STEP = 128
# More records to a step mean fewer steps for the adapter to learn in: beyond RECORDS_PER_STEP on average, sequences
# only get longer while FEWEST_STEPS are left of the run.
RECORDS_PER_STEP = 4
FEWEST_STEPS = 100
# What a step costs beside its tokens (launching, optimizer), in tokens: about 30 ms on one H200.
STEP_OVERHEAD = 150


def pack(lengths: Sequence[int], capacity: int, seed: int = 0) -> list[list[int]]:
    """Record numbers in packs of at most `capacity` tokens, by best fit in decreasing order of length.

    Every record is in one pack. Which of equally long records go together, and the packs' order, is drawn from `seed`.
    (Johnson 1973: best fit decreasing needs at most 11/9 of the fewest packs possible, in practice far fewer.)
    """
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    rng.shuffle(order)
    order.sort(key=lambda number: -lengths[number])
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for number in order:
        assert lengths[number] <= capacity
        place = bisect.bisect_left(room, (lengths[number], -1))
        free, index = room.pop(place) if place < len(room) else (capacity, len(packs))
        if index == len(packs):
            packs.append([])
        packs[index].append(number)
        bisect.insort(room, (free - lengths[number], index))
    rng.shuffle(packs)
    return packs


def fill(lengths: Sequence[int], capacity: int) -> float:
    """Share of the packs' tokens that belong to records."""
    return sum(lengths) / (capacity * len(pack(lengths, capacity)))


def choose_length(lengths: Sequence[int], most: int, epochs: float, sequences_per_step: int = 1) -> int:
    """The length of packed sequences that trains fastest.

    Args:
        lengths: tokens of each record.
        most: tokens that the card has room for without computing any layer twice; longer records get their way.
        epochs: how often each record is trained.
        sequences_per_step: sequences of an optimizer step.

    Returns:
        A multiple of `STEP`, at least the longest record's length.
    """
    least = round_up(max(lengths))
    total = sum(lengths)
    still_learns = max(total * epochs / FEWEST_STEPS, total / len(lengths) * RECORDS_PER_STEP) / sequences_per_step
    highest = max(least, round_up(math.floor(min(most - STEP + 1, still_learns))))
    lowest = max(least, highest // 2)
    sample = random.Random(0).sample(lengths, min(len(lengths), 10_000))
    return max(range(lowest, highest + 1, STEP), key=lambda n: fill(sample, n) * n / (n + STEP_OVERHEAD))


def activation_bytes(layers: int, hidden_size: int, intermediate_size: int) -> tuple[int, int]:
    """Bytes a token takes on the GPU in training: what all layers keep of it, and what the layer at work needs.

    A compiled layer keeps the MLP's two wide products and twice the hidden state in bf16 (measured on the 24B: 148 KB a
    token and layer). Beside that there are the layer at work, and every layer's input: 1 MB a token there. Where layers
    are computed twice, only the latter is needed.
    """
    kept = 2 * (2 * intermediate_size + 2 * hidden_size) * layers
    at_work = 2 * (9 * intermediate_size + hidden_size * layers)
    return kept, at_work


def round_up(tokens: int) -> int:
    """The next multiple of `STEP`."""
    return max(STEP, math.ceil(tokens / STEP) * STEP)


def prompt_groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The rows of a batch in groups of at most MAX_PROMPT_TOKENS together, but always one."""
    group: list[int] = []
    for row, length in enumerate(lengths):
        if group and sum(lengths[r] for r in group) + length > MAX_PROMPT_TOKENS:
            yield group
            group = []
        group.append(row)
    yield group
