"""What benches ask of the GPU. On a CPU, where they can only be tried out, each of these has an answer too."""

import gc
import time

import torch


def on_gpu() -> bool:
    """Whether torch has a GPU."""
    return torch.cuda.is_available()


def device_name() -> str:
    """What a table of figures is headed with."""
    return torch.cuda.get_device_name() if on_gpu() else "CPU"


def synchronize() -> None:
    """Wait for what the GPU was given to do."""
    if on_gpu():
        torch.cuda.synchronize()


def peak_gib() -> float:
    """GiB of GPU memory that this process had reserved at most since `free_memory`; 0 on a CPU."""
    return torch.cuda.max_memory_reserved() / 2**30 if on_gpu() else 0.0


def free_memory() -> None:
    """Give back the GPU memory that nothing refers to, and count its peak anew."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def matmul_peak() -> float:
    """FLOP/s of a large square product: in bf16 on a GPU, in fp32 on a CPU."""
    if not on_gpu():
        a, before = torch.randn(512, 512), time.perf_counter()
        for _ in range(20):
            a @ a
        return 20 * 2 * 512**3 / (time.perf_counter() - before)
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        a @ a
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(20):
        a @ a
    end.record()
    torch.cuda.synchronize()
    return 20 * 2 * size**3 / (start.elapsed_time(end) / 1e3)
