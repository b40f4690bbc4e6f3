"""The arguments of train that are ours. transformers' TrainingArguments come on top (see training_arguments.py)."""

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import HfArgumentParser

from mistral_ft.cli import ArgumentParser, OneLineErrors
from mistral_ft.data.records import MAX_SEQ_LENGTH
from mistral_ft.distributed import world_size
from mistral_ft.errors import UserError
from mistral_ft.folders import MODEL_ID
from mistral_ft.model.rounding import rounding_of
from mistral_ft.training.config_file import as_words, nearest, read_config

EPILOG = """Any transformers.TrainingArguments flag works too, such as --num_train_epochs 3, --learning_rate 1e-4,
--per_device_train_batch_size 1, --gradient_accumulation_steps 4, --warmup_steps 0.03 (below 1: a share of all steps),
--lr_scheduler_type cosine, --save_steps 500, --resume_from_checkpoint output/<name> (or auto: the newest run with the
same settings), --seed 42. Those that cannot act here are refused by name.

--config run.yaml holds flags without their dashes (lora_rank: 16); a run's own are in output/<name>/config.yaml."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, except where the help says in words what none means."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        return text if "default:" in text or action.default is None else super()._get_help_string(action) or ""


# Flags that people try, each with the reason why there is none here.
ABSENT = {
    "warmup_ratio": "is gone from transformers: write --warmup_steps 0.03 (below 1: a share)",
    "init_lora_weights": "is left out: PiSSA, OLoRA and the like change the base's weights, so that the adapter would "
    "be wrong on the base that predict and merge load",
}


class TrainParser(OneLineErrors, HfArgumentParser):
    """Parses our arguments and TrainingArguments into dataclasses, with errors of one line.

    --config names a file of them; what stands on the command line wins.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE", help="YAML or JSON file of flags; the command line wins over it.")

    def parse(self, words: Sequence[str] | None = None) -> tuple:
        """The dataclasses, in the order of the constructor.

        Args:
            words: the command line's; None takes `sys.argv`.

        Raises:
            UserError: for unknown arguments, and for values that transformers refuses.
        """
        words = list(sys.argv[1:] if words is None else words)
        first = ArgumentParser(prog=self.prog, add_help=False, allow_abbrev=False)
        first.add_argument("--config")
        if config := first.parse_known_args(words)[0].config:
            # Given twice, an option has its last value.
            words = self._config_words(config) + words
        try:
            *parsed, _, unknown = self.parse_args_into_dataclasses(words, return_remaining_strings=True)
        except ValueError as error:
            raise UserError(str(error)) from error
        for word in unknown:
            if (name := word.removeprefix("--").partition("=")[0].replace("-", "_")) in ABSENT:
                raise UserError(f"--{name} {ABSENT[name]}")
        if unknown:
            hint = nearest(unknown[0].removeprefix("--").partition("=")[0], self._actions_by_name)
            raise UserError(f"unknown arguments: {' '.join(unknown)}{hint} (see {self.prog} --help)")
        return tuple(parsed)

    @property
    def _actions_by_name(self) -> dict[str, argparse.Action]:
        return {action.dest: action for action in self._actions}

    def _config_words(self, path: str) -> list[str]:
        settings, actions = read_config(path), self._actions_by_name
        problems = []
        for name, value in settings.items():
            if name in ABSENT:
                problems.append(f"{name} {ABSENT[name]}")
            elif name not in actions or name in ("config", "help"):
                problems.append(f"unknown setting {name}{nearest(name, actions)}")
            elif isinstance(value, list) and actions[name].nargs != "+":
                problems.append(f"{name} takes one value")
        if problems:
            raise UserError(f"{path}: {'; '.join(problems)}")
        return as_words(settings)


def changed_fields(arguments: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    changed = {}
    for f in dataclasses.fields(arguments):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if getattr(arguments, f.name) != default:
            changed[f.name] = getattr(arguments, f.name)
    return changed


def _field(default: Any, text: str) -> Any:
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
    pdf_seconds: float | None = _field(None, "Seconds of work that a page of a PDF may take (default: 20).")
    keep_image_tag: bool = _field(False, "Take <image> for text in rows without an image.")
    max_seq_length: int = _field(
        MAX_SEQ_LENGTH, "Tokens a record may have, image tokens included; longer ones are refused, plain text is cut."
    )


@dataclass
class ModelArguments:
    """What to train."""

    model_id: str = _field(MODEL_ID, "Base model: a hub id or a folder.")
    base_dtype: Literal["bf16", "fp8"] = _field(
        "bf16", "fp8: keep the weights of the text layers in 8 bits, and multiply so; needs an Ada or Hopper GPU."
    )
    load_in_4bit: bool = _field(
        False, "QLoRA: keep the weights of the text layers in 4 bits, for smaller cards; needs requirements-4bit.txt."
    )
    gpu_memory_gib: float | None = _field(None, "GPU memory to get by with, as on a smaller card (default: all).")

    @property
    def rounding(self) -> str | None:
        """What the base's weights are rounded to."""
        return rounding_of(vars(self))

    def problems(self) -> list[str]:
        """Everything wrong with these arguments, one line each."""
        both = self.load_in_4bit and self.base_dtype == "fp8"
        return ["--base_dtype fp8 and --load_in_4bit True exclude each other"] if both else []


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


# What evaluation measures; of some more is better, of the others less.
METRICS, BETTER_HIGH = ("loss", "exact_match", "cer"), ("exact_match",)
ROWS_ANSWERED = 16  # at each evaluation, if nothing else is asked for
# Flags of TrainingArguments that ask for an evaluation.
ABOUT_EVALUATION = (
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "load_best_model_at_end", "metric_for_best_model",
)  # fmt: skip


@dataclass
class EvaluationArguments:
    """What to measure while training, beside --eval_strategy and --eval_steps (default: after every epoch)."""

    eval_dataset: list[str] | None = field(
        default=None, metadata={"help": "Data that is not learned; its loss is measured, and some of it is answered."}
    )
    eval_fraction: float | None = _field(None, "Take such a share of --dataset instead, pages and all.")
    eval_generate: int | None = _field(
        None, f"Answer so many of its records at each evaluation (default: {ROWS_ANSWERED}; 0 with --shard_base True)."
    )
    early_stopping_patience: int | None = _field(
        None, "End after so many evaluations in a row without a better one, and keep the adapter of the best."
    )

    @property
    def wanted(self) -> bool:
        """Whether there is data to evaluate on."""
        return self.eval_dataset is not None or self.eval_fraction is not None

    def answered(self, shard_base: bool) -> int:
        """How many records are answered at each evaluation; whole layers are needed for it."""
        return self.eval_generate if self.eval_generate is not None else 0 if shard_base else ROWS_ANSWERED

    def problems(self, args: Any, shard_base: bool) -> list[str]:
        """Everything wrong with these arguments, one line each.

        Args:
            args: a `training_arguments.FinetuneArguments`.
        """
        found = []
        if self.eval_dataset is not None and self.eval_fraction is not None:
            found.append("--eval_dataset and --eval_fraction: give one of them")
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            found.append(f"--eval_fraction {self.eval_fraction:g}: must be more than 0 and less than 1")
        for name, least in (("eval_generate", 0), ("early_stopping_patience", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                found.append(f"--{name} {value}: must be at least {least}")
        given = [name for name in changed_fields(self) if not name.startswith(("eval_dataset", "eval_fraction"))]
        given += [name for name in ABOUT_EVALUATION if name in args.given]
        if args.save_strategy == "best":
            given.append("save_strategy best")
        if not self.wanted:
            found += [f"--{name} has no effect without --eval_dataset or --eval_fraction" for name in given]
        answered = self.answered(shard_base)
        if shard_base and answered:
            found.append("--eval_generate needs whole layers, and --shard_base True has none; leave it out")
        if answered == 0 and args.metric_for_best_model != "loss":
            found.append(f"--metric_for_best_model {args.metric_for_best_model} needs answers: --eval_generate 16")
        return found


@dataclass
class LoraArguments:
    """How to adapt it."""

    init_adapter: str | None = _field(
        None,
        "Go on from the adapter of this run in output/, or path, instead of a new one, on new or corrected data.",
    )
    lora_rank: int = _field(16, "Rank of the adapter matrices.")
    lora_alpha: int = _field(32, "The adapter's output is scaled by lora_alpha / lora_rank.")
    use_rslora: bool = _field(False, "Scale it by lora_alpha / sqrt(lora_rank) instead: for high ranks.")
    rank_pattern: str | None = _field(
        None, "Other ranks by the end of layers' names, a regular expression: '{\"mlp.down_proj\": 32}'."
    )
    alpha_pattern: str | None = _field(None, "Other alphas, likewise.")
    lora_dropout: float = _field(0.05, "Dropout on the adapter's input.")
    target_modules: str | None = _field(
        None,
        "Adapt only those linear layers of the text model whose whole name this regular expression matches, such "
        "as '.*\\.[qv]_proj' (default: all).",
    )
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
    loraplus_lr_ratio: float | None = _field(
        None, "LoRA+: how many times their learning rate the adapter's B matrices get (default: 1; the paper takes 16)."
    )

    def __post_init__(self) -> None:
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
        for name in ("rank_pattern", "alpha_pattern"):
            try:
                patterns = json.loads(getattr(self, name) or "{}")
                if not isinstance(patterns, dict) or not all(type(n) is int and n > 0 for n in patterns.values()):
                    raise ValueError
                for pattern in patterns:
                    re.compile(pattern)
            except (ValueError, re.error):
                example = '{"mlp.down_proj": 32}'
                found.append(f"--{name} {getattr(self, name)}: expected patterns and whole numbers, such as {example}")
        if self.target_modules is not None:
            try:
                re.compile(self.target_modules)
            except re.error as error:
                found.append(f"--target_modules {self.target_modules}: no regular expression: {error}")
            if self.num_lora_modules >= 0:
                found.append("--target_modules and --num_lora_modules: give one of them")
        if self.loraplus_lr_ratio is not None and not 0 < self.loraplus_lr_ratio < math.inf:
            found.append(f"--loraplus_lr_ratio {self.loraplus_lr_ratio}: must be more than 0")
        if self.vision_lr is not None and not self.vision_lora:
            found.append("--vision_lr has no effect without --vision_lora True")
        if self.projector_lr is not None and not self.train_projector:
            found.append("--projector_lr has no effect without --train_projector True")
        return found


# transformers' own come on top: see `settings`.
OURS = (
    DataArguments, ModelArguments, LoraArguments, EvaluationArguments, SpeedArguments, CheckpointArguments
)  # fmt: skip
