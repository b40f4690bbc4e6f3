"""What a base's weights are rounded to: 4 bits, FP8 or nothing."""

import importlib.util
from typing import TYPE_CHECKING, Any

from mistral_ft.errors import UserError

if TYPE_CHECKING:
    import torch

# What the weights of a base's text layers may be rounded to while they are loaded.
FOUR_BITS, FP8 = "4 bits", "FP8"


def is_four_bit(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a 4-bit copy made by bitsandbytes."""
    quantization = config.get("quantization_config") or {}
    return quantization.get("quant_method") == "bitsandbytes" and bool(quantization.get("load_in_4bit"))


def check_rounding(rounding: str | None, device: "torch.device") -> None:
    """Raises UserError if weights cannot be rounded so here."""
    # Few need the package.
    if rounding == FOUR_BITS and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("4-bit weights need bitsandbytes: pip install -r requirements-4bit.txt")
    if rounding != FP8 or device.type != "cuda":
        return
    import torch  # train --help does without

    # Compute capability 8.9 is Ada's; a CPU computes such products too.
    if torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise UserError(f"--base_dtype fp8 needs a GPU of the Ada or Hopper generation or a later one; this is {name}")


def rounding_of(settings: dict[str, Any]) -> str | None:
    """What a base's weights are rounded to by `ModelArguments`, which may be those in a run.json; None for nothing."""
    if settings.get("load_in_4bit"):
        return FOUR_BITS
    return FP8 if settings.get("base_dtype") == "fp8" else None
