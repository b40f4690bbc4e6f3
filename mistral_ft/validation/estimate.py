"""What a card has room for and how long an epoch takes, before there is a card: from the plan that train makes and
speeds that were measured. Only the 24B was."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mistral_ft.data.packing import STEP, STEP_OVERHEAD, activation_bytes, choose_length, fill
from mistral_ft.files import JsonObject, read_settings

# Layers, width, and width of the MLP of Mistral-Small-3.1-24B.
MEASURED_SHAPE = (40, 5120, 32768)
# Measured there: rank 16, all settings left alone, on one H200 limited to what an 80 GB card gives.
CARD_GIB = 78.5
WEIGHTS_GIB = 44.7
LEARNED_GIB = 12 * 92.4e6 / 2**30  # adapters of rank 16: gradients and Adam's moments in fp32
SPARE_GIB = 0.75  # as preflight leaves free in its trials
PAGES_SPEED, PAGES_FILL = 5237, 0.968  # tokens a second in sequences of no layer computed twice, and how full they were
LONGEST, LONGEST_SPEED = 31_602, 2624  # tokens of one record, all layers computed twice, and its tokens a second
SAMPLE = 10_000  # records that the packing is tried on


def is_measured(folder: str | os.PathLike) -> bool:
    """Whether a model's folder is one of the shape that was measured."""
    text: JsonObject = read_settings(Path(folder) / "config.json").get("text_config") or {}
    return tuple(text.get(name) for name in ("num_hidden_layers", "hidden_size", "intermediate_size")) == MEASURED_SHAPE


def longest_that_fits(recomputed: bool) -> int:
    """Tokens of a sequence that the card has room for, with all layers computed twice or none."""
    kept, at_work = activation_bytes(*MEASURED_SHAPE)
    # A GiB more, as preflight's estimate has it, where trials have not had the last word.
    free = CARD_GIB - WEIGHTS_GIB - LEARNED_GIB - SPARE_GIB - (0 if recomputed else 1)
    return int(free * 2**30 / (at_work if recomputed else kept + at_work))


def epoch_seconds(lengths: Sequence[int]) -> tuple[float, int]:
    """(Seconds, tokens of a packed sequence) of one epoch over records of these lengths, as train would pack them.

    Between the two sequence lengths that were measured, the time a token takes is taken to grow evenly; shorter ones
    take longer by what a step costs beside its tokens.
    """
    most = longest_that_fits(recomputed=False)
    length = choose_length(lengths, most, epochs=1)
    sample = lengths if len(lengths) <= SAMPLE else np.random.default_rng(0).choice(lengths, SAMPLE, False).tolist()
    tokens = sum(lengths) / fill(sample, length)
    share = max(0.0, (length - most) / (LONGEST - most))
    each = (1 - share) * PAGES_FILL / PAGES_SPEED + share / LONGEST_SPEED
    return tokens * each * max(1, (1 + STEP_OVERHEAD / length) / (1 + STEP_OVERHEAD / most)), length


def describe_training(lengths: Sequence[int], named: Sequence[tuple[object, int]]) -> Iterator[str]:
    """Lines for people: what fits, and how long an epoch takes.

    Args:
        lengths: tokens of the records to train, at least one.
        named: (place, tokens) of the longest records, the longest first.
    """
    most, usual = longest_that_fits(recomputed=True), longest_that_fits(recomputed=False)
    yield f"On an 80 GB card ({CARD_GIB} GiB; figures of the 24B on one H200, rank 16; not run on an A100):"
    too_long = [length for length in lengths if length > most]
    if too_long:
        examples = ", ".join(f"{place} ({length:,})" for place, length in named if length > most)
        yield f"  longer than the about {_rounded(most):,} tokens that fit: {len(too_long):,}, such as {examples}"
        lengths = [length for length in lengths if length <= most]
        if not lengths:
            return
    else:
        yield f"  all records fit: the longest has {max(lengths):,} tokens, and about {_rounded(most):,} have room"
    seconds, length = epoch_seconds(lengths)
    yield f"  one epoch takes about {duration(seconds)}: {sum(lengths):,} tokens, in sequences of {length:,}"
    short = [tokens for tokens in lengths if tokens <= usual]
    if length > usual + STEP and short:
        without, _ = epoch_seconds(short)
        yield (
            f"  the longest record sets the length of all sequences: without those of more than {_rounded(usual):,} "
            f"tokens ({len(lengths) - len(short):,}) it takes about {duration(without)}"
        )


def duration(seconds: float) -> str:
    """A time for people."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{_rounded(seconds / size):g} {unit}"
    return f"{_rounded(seconds):g} s"


def _rounded(value: float) -> float:
    """Two digits of a number: an estimate has no more."""
    rounded = float(f"{value:.2g}")
    return int(rounded) if value >= 10 else rounded
