"""The arguments of train that are ours. transformers' TrainingArguments come on top (see training.py)."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any

from transformers import HfArgumentParser

from mistral_ft.distributed import world_size
from mistral_ft.errors import OneLineErrors, UserError
from mistral_ft.hub import MODEL_ID
from mistral_ft.records import MAX_SEQ_LENGTH

EPILOG = """Any transformers.TrainingArguments flag works too, such as --num_train_epochs 3, --learning_rate 1e-4,
--per_device_train_batch_size 1, --gradient_accumulation_steps 4, --warmup_steps 0.03 (below 1: a share of all steps),
--lr_scheduler_type cosine, --save_steps 500, --resume_from_checkpoint output/<name> (or auto: the newest run with the
same settings), --seed 42. Those that cannot act here are refused by name."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, except where the help says in words what none means."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if "default:" in action.help or action.default is None else super()._get_help_string(action)


class TrainParser(OneLineErrors, HfArgumentParser):
    """Parses our arguments and TrainingArguments into dataclasses, with errors of one line."""

    def parse(self) -> tuple:
        """The dataclasses, in the order given.

        Raises:
            UserError: for unknown arguments, and for values that transformers refuses.
        """
        try:
            *parsed, unknown = self.parse_args_into_dataclasses(return_remaining_strings=True)
        except (ValueError, ImportError) as error:
            raise UserError(str(error)) from error
        if any(word.startswith("--warmup_ratio") for word in unknown):
            raise UserError("--warmup_ratio is gone from transformers: write --warmup_steps 0.03 (below 1: a share)")
        if unknown:
            raise UserError(f"unknown arguments: {' '.join(unknown)} (see {self.prog} --help)")
        return tuple(parsed)


def changed_fields(arguments: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    changed = {}
    for f in dataclasses.fields(arguments):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if getattr(arguments, f.name) != default:
            changed[f.name] = getattr(arguments, f.name)
    return changed


def _field(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class DataArguments:
    """What to learn from."""

    dataset: list[str] = field(
        default_factory=lambda: ["dataset/train.jsonl"],
        metadata={"help": "JSONL file of records with `expected`; several are trained as one."},
    )
    images_dir: str | None = _field(None, "Folder that image paths are relative to (default: the JSONL file's own).")
    max_image_pixels: int | None = _field(None, "Pixels an image may have (default: 178 million); more are refused.")
    max_seq_length: int = _field(
        MAX_SEQ_LENGTH, "Tokens a record may have, image tokens included; longer ones are refused, plain text is cut."
    )


@dataclass
class ModelArguments:
    """What to train."""

    model_id: str = _field(MODEL_ID, "Base model: a hub id or a folder.")
    load_in_4bit: bool = _field(
        False, "QLoRA: keep the weights of the text layers in 4 bits, for smaller cards; needs requirements-4bit.txt."
    )
    gpu_memory_gib: float | None = _field(None, "GPU memory to get by with, as on a smaller card (default: all).")


@dataclass
class SpeedArguments:
    """How records are laid out and layers are run. Left alone, all of it is chosen to fit the GPU."""

    packing: bool | None = _field(
        None, "Records share sequences of one length (default: on a GPU, with --per_device_train_batch_size 1)."
    )
    pack_length: int | None = _field(None, "Tokens of such a sequence (default: by the GPU's memory and the data).")
    compile: bool | None = _field(None, "Compile the layers (default: on a GPU).")
    shard_base: bool = _field(
        False, "Of several processes, each keeps a share of the base's text layers (FSDP2), for smaller cards."
    )

    def problems(self) -> list[str]:
        """Everything wrong with these arguments, one line each."""
        found = []
        if self.pack_length is not None and self.packing is False:
            found.append("--pack_length has no effect with --packing False")
        elif self.pack_length is not None and self.pack_length < 1:
            found.append(f"--pack_length {self.pack_length}: must be at least 1")
        if self.shard_base and world_size() == 1:
            found.append("--shard_base True needs several processes: start them with torchrun --nproc_per_node")
        return found


@dataclass
class CheckpointArguments:
    """When to save, beside --save_steps."""

    save_minutes: float | None = _field(None, "Save a checkpoint at least so often (default: by --save_steps alone).")

    def problems(self) -> list[str]:
        """Everything wrong with these arguments, one line each."""
        wrong = self.save_minutes is not None and not self.save_minutes > 0
        return [f"--save_minutes {self.save_minutes:g}: must be more than 0"] if wrong else []


@dataclass
class LoraArguments:
    """How to adapt it."""

    lora_rank: int = _field(16, "Rank of the adapter matrices.")
    lora_alpha: int = _field(32, "The adapter's output is scaled by lora_alpha / lora_rank.")
    lora_dropout: float = _field(0.05, "Dropout on the adapter's input.")
    num_lora_modules: int = _field(-1, "Adapt only so many linear layers of the text model (-1: all).")
    lora_modules_truncate_tail: bool = _field(
        False, "With --num_lora_modules: keep the layers at the model's start instead of those at its end."
    )
    lora_modules_truncate_offset: int = _field(
        0, "With --num_lora_modules: leave out so many linear layers at that end before counting."
    )
    use_dora: bool = _field(False, "Train DoRA (magnitude and direction apart) instead of plain LoRA.")
    vision_lora: bool = _field(False, "Adapt the vision tower too.")
    freeze_vision_tower: bool | None = _field(
        None, "The opposite of --vision_lora, under the name that older scripts use."
    )
    train_projector: bool = _field(False, "Adapt the projector between vision tower and text model too.")
    vision_lr: float | None = _field(None, "Learning rate of the vision tower's adapter (default: --learning_rate).")
    projector_lr: float | None = _field(None, "Learning rate of the projector's adapter (default: --learning_rate).")

    def __post_init__(self):
        if self.freeze_vision_tower is False:
            self.vision_lora = True

    def problems(self) -> list[str]:
        """Everything wrong with these arguments, one line each."""
        found = []
        if self.freeze_vision_tower and self.vision_lora:
            found.append("--freeze_vision_tower True and --vision_lora True contradict each other")
        if self.lora_rank < 1:
            found.append(f"--lora_rank {self.lora_rank}: must be at least 1")
        if not 0 <= self.lora_dropout < 1:
            found.append(f"--lora_dropout {self.lora_dropout}: must be at least 0 and below 1")
        if self.lora_alpha < 1:
            found.append(f"--lora_alpha {self.lora_alpha}: must be at least 1")
        if self.num_lora_modules < -1 or self.num_lora_modules == 0:
            found.append(f"--num_lora_modules {self.num_lora_modules}: must be at least 1, or -1 for all")
        if self.num_lora_modules < 0 and (self.lora_modules_truncate_tail or self.lora_modules_truncate_offset):
            found.append("--lora_modules_truncate_tail and --lora_modules_truncate_offset need --num_lora_modules")
        if self.lora_modules_truncate_offset < 0:
            found.append(f"--lora_modules_truncate_offset {self.lora_modules_truncate_offset}: must not be negative")
        if self.vision_lr is not None and not self.vision_lora:
            found.append("--vision_lr has no effect without --vision_lora True")
        if self.projector_lr is not None and not self.train_projector:
            found.append("--projector_lr has no effect without --train_projector True")
        return found
