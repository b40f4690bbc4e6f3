"""The state of torch's random generators."""

import torch


def random_state(device: torch.device) -> list[torch.Tensor]:
    """Of torch's generators on the CPU and on the GPU in use."""
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


def set_random_state(state: list[torch.Tensor]) -> None:
    """Go back to a state that `random_state` returned."""
    torch.set_rng_state(state[0])
    for on_gpu in state[1:]:
        torch.cuda.set_rng_state(on_gpu)
