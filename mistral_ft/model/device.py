"""The GPU or the CPU that a step computes on, and its memory."""

import math
import sys
import warnings

import torch
from transformers.utils import logging

from mistral_ft.distributed import gather
from mistral_ft.errors import UserError
from mistral_ft.model.gpus import check_generation, use_gpu


def pick_device(gpu_memory_gib: float | None = None, use_cpu: bool = False) -> torch.device:
    """The first GPU, else the CPU.

    Args:
        use_cpu: take the CPU whatever there is.
        gpu_memory_gib: the memory to get by with, as on a smaller card; None takes all there is.

    Raises:
        UserError: if there is a card that torch cannot use, the card has less memory than that, or there is no GPU to
            limit.
    """
    if not use_gpu(use_cpu):
        if gpu_memory_gib is not None:
            raise UserError("--gpu_memory_gib: there is no GPU here to limit")
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    check_generation(device.index)
    if gpu_memory_gib is not None:
        there = torch.cuda.get_device_properties(device).total_memory / 2**30
        if not 0 < gpu_memory_gib <= there:
            raise UserError(f"--gpu_memory_gib {gpu_memory_gib:g}: the card has {math.floor(there * 10) / 10} GiB")
        torch.cuda.set_per_process_memory_fraction(gpu_memory_gib / there, device)
    return device


def limit_gib(device: torch.device) -> float:
    """GiB that torch may reserve: what is free, or what `pick_device` was told to get by with."""
    free, total = torch.cuda.mem_get_info(device)
    there = free + torch.cuda.memory_reserved(device)
    return min(there, torch.cuda.get_per_process_memory_fraction(device) * total) / 2**30


def print_peak_memory(device: torch.device) -> None:
    """Say how much memory torch had reserved on the GPU, at most, of several processes on each; nothing on a CPU."""
    if device.type == "cuda":
        peaks = gather(torch.cuda.max_memory_reserved(device) / 2**30)
        each = f" (by process: {', '.join(f'{peak:.1f}' for peak in peaks)})" if len(peaks) > 1 else ""
        print(f"Peak GPU memory {max(peaks):.1f} GiB{each}")


def quiet_libraries() -> None:
    """Keep the libraries' own chatter off the user's screen; their progress bars stay, on a terminal."""
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="PIL")  # what is wrong with a page is said by file and line
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
