"""The optimizer: proven to be there before anything slow starts, with a learning rate for each part of the adapter."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import Trainer, get_scheduler

from mistral_ft.errors import UserError
from mistral_ft.training.training_arguments import FinetuneArguments


def check_optimizer(args: FinetuneArguments) -> None:
    """Build the optimizer and the schedule for a single number, so that wrong flags end before the model is loaded.

    Raises:
        UserError: what they say.
    """
    try:
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **kwargs)
        warmup, more = args.get_warmup_steps(10), args.lr_scheduler_kwargs
        assert not isinstance(more, str)  # transformers has read it
        get_scheduler(args.lr_scheduler_type, optimizer, warmup, 10, scheduler_specific_kwargs=more)
    except Exception as error:
        raise UserError(f"--optim {args.optim}, --lr_scheduler_type {args.lr_scheduler_type}: {error}") from error


def split_by_rate(
    optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter], rates: Mapping[str, float], b_ratio: float
) -> None:
    """Split an optimizer's parameter groups by learning rate.

    Args:
        trained: its parameters, by name.
        rates: by a part of the name; other parameters keep their group's.
        b_ratio: how many times its rate an adapter's B matrix gets.
    """
    names = {parameter: name for name, parameter in trained.items()}
    groups = []
    for group in optimizer.param_groups:
        by_rate: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            rate = next((rate for part, rate in rates.items() if part in names[parameter]), group["lr"])
            by_rate.setdefault(rate * (b_ratio if "lora_B" in names[parameter] else 1), []).append(parameter)
        groups += [group | {"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
    optimizer.param_groups[:] = groups
