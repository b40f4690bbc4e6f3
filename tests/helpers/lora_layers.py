"""What an adapter's layers compute, as peft runs them and as this toolkit does."""

import torch
from torch import nn

from mistral_ft.model.layers import Seeds


def by_peft_and_by_us(model: nn.Module, ids: torch.Tensor) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Logits, and gradients by the names of what learns: of peft's layers, then of ours; the adapter is random."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    found = []
    for ours in (False, True):
        model.zero_grad()
        if ours:
            Seeds(model)
        logits = model(input_ids=ids).logits
        logits.logsumexp(-1).sum().backward()
        found.append((logits, {name: parameter.grad.clone() for name, parameter in trained.items()}))
    return found
