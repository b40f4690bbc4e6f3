"""How much memory a model's weights take, and whether the device has it."""

import re
import sys
from pathlib import Path

import torch
from transformers import AutoConfig

from mistral_ft.distributed import rank
from mistral_ft.errors import UserError
from mistral_ft.model.adapter import TEXT_LAYERS
from mistral_ft.model.device import limit_gib
from mistral_ft.model.gpus import ON_CPU, other_card
from mistral_ft.model.loading import ARCHITECTURES, text_model
from mistral_ft.model.rounding import FOUR_BITS, FP8

# Memory beside the weights, as a share of them, without which not even the shortest record can be computed.
SPARE_SHARE = 0.02


# GiB of weights in bf16 up to which a CPU is of use where there is a card.
MOST_ON_CPU = 2


def weight_bytes(folder: Path, rounding: str | None = None, processes: int = 1) -> float:
    """Bytes of a model's weights on a GPU, from its config.json alone.

    Args:
        rounding: what the text layers' weights are rounded to.
        processes: how many share the text layers, as `shard_layers` does it. Each also holds one layer whole.

    Raises:
        UserError: if no model can be made of the config.json.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = ARCHITECTURES[config.model_type][0](config)
    except Exception as error:  # transformers fails in many ways on a config.json that does not fit together
        raise UserError(f"{folder / 'config.json'}: broken: {(str(error).splitlines() or ['?'])[0]}") from error
    # Rounded weights with their scales, and the adapter beside them in fp32: together at most so many bytes a weight.
    rounded = {FOUR_BITS: 0.55, FP8: 1.05, None: 2}[rounding]
    weights = sum(
        p.numel() * (rounded if re.fullmatch(rf"({TEXT_LAYERS})\.weight", name) else 2)
        for name, p in model.named_parameters()
    )
    if processes > 1:
        layers = [sum(2 * p.numel() for p in layer.parameters()) for layer in text_model(model).layers]
        weights -= sum(layers) * (1 - 1 / processes) - max(layers)
    return weights


def check_size(
    name: str,
    folder: Path,
    device: torch.device,
    rounding: str | None = None,
    processes: int = 1,
    smaller: str | None = None,
    use_cpu: bool = False,
) -> None:
    """Refuse a model that is too big for the device, before its weights are downloaded or read.

    On a CPU, name a card that is left unused.

    Args:
        name: what the user calls the model.
        folder: of the model; only its config.json is read.
        rounding: what the text layers' weights are rounded to.
        processes: how many share the text layers.
        smaller: the flag that has the step keep the weights in 4 bits, if it has one.
        use_cpu: whether the user asked for the CPU.

    Raises:
        UserError: what there is, what is needed, and what to do.
    """
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        needed = weight_bytes(folder, rounding, processes)
        rounded = weight_bytes(folder, FOUR_BITS) if smaller else None
        free, limited = limit_gib(device) * 2**30, torch.cuda.get_per_process_memory_fraction(device) < 1
        if problem := too_big(card.name, free, card.total_memory, limited, needed, smaller, rounded):
            kind = f"in {rounding or 'bf16'}" + (f", shared by {processes} processes," if processes > 1 else "")
            raise UserError(f"{name} {kind} {problem}")
    elif not use_cpu and (reason := other_card()):
        gib = weight_bytes(folder) / 2**30
        if gib > MOST_ON_CPU:
            raise UserError(f"{reason}, and {name} with its {gib:.1f} GiB of weights is too big for the CPU; {ON_CPU}")
        if rank() == 0:
            print(f"{reason}: using the CPU", file=sys.stderr)


def too_big(
    card: str,
    free: float,
    total: float,
    limited: bool,
    needed: float,
    smaller: str | None = None,
    rounded: float | None = None,
) -> str | None:
    """Why weights do not go onto a card, and what to do, as the end of a sentence that begins with the model; or None.

    Args:
        card: its name.
        free: bytes that may be used of its `total`.
        limited: whether --gpu_memory_gib says so.
        needed: bytes of the weights.
        smaller: the flag for 4 bits, with which they have `rounded` bytes.
    """

    def fits(weights: float, there: float) -> bool:
        return weights * (1 + SPARE_SHARE) <= there

    if fits(needed, free):
        return None
    line = f"takes {needed / 2**30:.1f} GiB for its weights alone, and {card} has {free / 2**30:.1f} GiB free"
    way = "take a larger card"
    if fits(needed, total):
        line += f" of {total / 2**30:.1f}"
        way = "raise --gpu_memory_gib" if limited else "end the other programs on it (nvidia-smi shows them)"
    return f"{line}: {way}" + (
        f", or {smaller} (docs/recipes.md)" if smaller and rounded and fits(rounded, free) else ""
    )
