"""Which layers get an adapter, and where it begins."""

import json
import re

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, set_seed

from mistral_ft.errors import UserError
from mistral_ft.folders import ADAPTER_WEIGHTS, RUN_FILE, find_model_folder, full_name, locate
from mistral_ft.model.adapter import PROJECTOR, TEXT_LAYERS, VISION_LAYERS, Adapter, by_pattern
from mistral_ft.model.loading import held_bytes, load_base
from mistral_ft.training.arguments import LoraArguments, changed_fields
from mistral_ft.training.settings import Settings


def target_modules(model: nn.Module, args: LoraArguments) -> str:
    """A regular expression that matches in full the names of the linear layers to adapt.

    All those of the text model, those that `args.target_modules` matches, or `num_lora_modules` of them in the model's
    order; with `vision_lora` those of the vision tower, with `train_projector` those of the projector. (A list of leaf
    names, as most scripts give peft, would hit the vision tower too.)

    Raises:
        UserError: if the truncation or the expression leaves nothing, or asks for more than there are.
    """
    names = [name for name, _ in model.named_modules() if re.fullmatch(TEXT_LAYERS, name)]
    chosen = TEXT_LAYERS
    count, offset = args.num_lora_modules, args.lora_modules_truncate_offset
    if count >= 0:
        if count == 0 or offset + count > len(names):
            raise UserError(
                f"--num_lora_modules {count} with --lora_modules_truncate_offset {offset}: the text model has "
                f"{len(names)} linear layers; give both so that they fit, or --num_lora_modules -1 for all"
            )
        start = offset if args.lora_modules_truncate_tail else len(names) - offset - count
        chosen = "|".join(map(re.escape, names[start : start + count]))
    if args.target_modules is not None:
        matched = [name for name in names if re.fullmatch(args.target_modules, name)]
        if not matched:
            raise UserError(
                f"--target_modules {args.target_modules}: matches no linear layer of the text model, such as {names[0]}"
            )
        chosen = "|".join(map(re.escape, matched))
    return "|".join([chosen] + [VISION_LAYERS] * args.vision_lora + [PROJECTOR] * args.train_projector)


# Flags of an adapter that do not say which matrices it has, and how they are scaled.
FREE_TO_CHANGE = {
    "init_adapter", "lora_dropout", "freeze_vision_tower", "vision_lr", "projector_lr", "loraplus_lr_ratio"
}  # fmt: skip


def find_start(settings: Settings) -> Adapter | None:
    """The adapter of --init_adapter; None without one.

    Raises:
        UserError: if it is no run's, or that run had another base or other flags that give the adapter its shape.
    """
    args, model_id = settings.lora, settings.model.model_id
    if args.init_adapter is None:
        return None
    adapter, now = Adapter(locate(args.init_adapter)), changed_fields(args)
    try:
        base, then = adapter.run["base_model"], adapter.run["settings"]["lora"]
    except (KeyError, TypeError):
        raise UserError(
            f"--init_adapter {args.init_adapter}: there is no {RUN_FILE} of train's, which says what flags it needs"
        ) from None
    differing = {"model_id": base} if full_name(base) != full_name(model_id) else {}
    for name in sorted((then.keys() | now.keys()) - FREE_TO_CHANGE):
        if then.get(name) != now.get(name):
            differing[name] = then.get(name, getattr(LoraArguments(), name))
    if differing:
        flags = " ".join(f"--{name} {value}" for name, value in differing.items())
        raise UserError(f"--init_adapter {args.init_adapter}: was made with {flags}; give the same")
    return adapter


def load_with_adapter(settings: Settings, device: torch.device, start: Adapter | None) -> PeftModel:
    """The base, frozen, with an adapter to train; says how much of it learns.

    Args:
        start: see `add_adapter`.
    """
    name, sharded = settings.model.model_id, settings.speed.shard_base
    set_seed(settings.training.seed)
    base = load_base(find_model_folder(name), device, sharded, settings.model.rounding)
    model = add_adapter(base, settings.lora, name, start)
    print("{:,} of {:,} parameters learn".format(*model.get_nb_trainable_parameters()))
    if sharded:
        held, whole = (amount / 2**30 for amount in held_bytes(model))
        print(f"Each process holds {held:.4g} GiB of the {whole:.4g} GiB that the model has")
    return model


def add_adapter(model: PreTrainedModel, args: LoraArguments, model_id: str, start: Adapter | None = None) -> PeftModel:
    """Freeze the model and wrap it with an adapter that names `model_id` as its base.

    A new one, or one with the values of `start`, which must have the same shape (see `find_start`).

    Raises:
        UserError: if one of the arguments fits to no layer.
    """
    targets = target_modules(model, args)
    names = [name for name, _ in model.named_modules() if re.fullmatch(targets, name)]
    patterns = {name: json.loads(getattr(args, name) or "{}") for name in ("rank_pattern", "alpha_pattern")}
    for flag, pattern in ((flag, pattern) for flag, found in patterns.items() for pattern in found):
        if not any(by_pattern({pattern: True}, name, False) for name in names):
            raise UserError(f"--{flag}: {pattern} is the end of no adapted layer's name, such as {names[0]}")
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        use_dora=args.use_dora,
        use_rslora=args.use_rslora,
        target_modules=targets,
        **patterns,
        bias="none",
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    config.base_model_name_or_path = model_id  # peft writes the folder it was loaded from
    if start is not None:
        set_peft_model_state_dict(wrapped, load_file(start.folder / ADAPTER_WEIGHTS))
        start.check_loaded(wrapped)
    assert isinstance(wrapped, PeftModel)  # mixed models come from another function
    return wrapped
