"""The trainer: transformers' own, with a loss at label positions only and a line that says how it goes."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.trainer_callback import DefaultFlowCallback

from mistral_ft.arguments import changed_fields
from mistral_ft.data import PackedDataset, RecordDataset, TrainingCollator
from mistral_ft.errors import UserError
from mistral_ft.layers import Seeds
from mistral_ft.progress import Progress

# Labels whose logits are there at once: 1 GiB of them with 131,072 ids. They are computed again in backward.
LABELS_AT_ONCE = 2048

# TrainingArguments that cannot act here, each with the reason. Whoever sets one is told instead of ignored.
REFUSED = {
    "there is no evaluation during training; run predict and score on a test file": (
        "do_eval do_predict eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps "
        "eval_do_concat_batches eval_use_gather_object per_device_eval_batch_size prediction_loss_only "
        "batch_eval_metrics include_for_metrics load_best_model_at_end metric_for_best_model greater_is_better "
        "bf16_full_eval fp16_full_eval"
    ),
    "the loss is computed at label positions, by this toolkit": "label_smoothing_factor label_names use_liger_kernel",
    "the base is trained in bfloat16": "fp16",
    "records have no columns": "remove_unused_columns length_column_name train_sampling_strategy group_by_length",
    "the model is not compiled as a whole": "torch_compile torch_compile_backend torch_compile_mode",
    "training never uses a cache": "use_cache",
    "a run is uploaded after it was checked: hf upload <repo> <run folder>": (
        "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision"
    ),
    "a checkpoint that cannot be resumed from is of no use": "save_only_model",
    "progress is a bar on a terminal and plain lines elsewhere": "disable_tqdm",
}


@dataclass
class FinetuneArguments(TrainingArguments):
    """TrainingArguments with this toolkit's defaults.

    Attributes:
        given: the arguments that the user set, as they were set.
        recompute: whether all layers or none are computed twice (activation checkpointing); None: as many as needed.
    """

    output_dir: str | None = "output"
    per_device_train_batch_size: int = 1
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False  # a loss that is not a number is never hidden
    remove_unused_columns: bool = False
    bf16: bool | None = None  # it says what is so anyway: bfloat16 on a GPU, float32 on a CPU
    gradient_checkpointing: bool | None = None  # default: as many layers as the GPU's memory asks for
    dataloader_num_workers: int | None = None  # default: 4 with a GPU, which is faster than pages are read

    def __post_init__(self):
        """Raises ValueError, one line for all arguments that cannot act here."""
        self.given = changed_fields(self)  # before anything is derived from the machine or the libraries' state
        problems = [
            f"--{name}: {reason}" for reason, names in REFUSED.items() for name in names.split() if name in self.given
        ]
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is not None and self.bf16 != on_gpu:
            problems.append(f"--bf16 {self.bf16}: the base is trained in bfloat16 on a GPU and in float32 on a CPU")
        kwargs = getattr(self, "activation_checkpointing_kwargs", None) or self.gradient_checkpointing_kwargs
        if (isinstance(kwargs, dict) and kwargs.get("use_reentrant")) or 'use_reentrant": true' in str(kwargs).lower():
            problems.append("checkpointing is never re-entrant: that loses the vision tower's gradient")
        in_range = {
            "max_steps": self.max_steps == -1 or self.max_steps >= 1,
            "num_train_epochs": self.max_steps > 0 or 0 < self.num_train_epochs < math.inf,
            "per_device_train_batch_size": self.per_device_train_batch_size >= 1,
            "gradient_accumulation_steps": self.gradient_accumulation_steps >= 1,
            "learning_rate": 0 < self.learning_rate < math.inf,
            "dataloader_num_workers": self.dataloader_num_workers is None or self.dataloader_num_workers >= 0,
            "seed": 0 <= self.seed < 2**32,
        }
        problems += [f"--{name} {getattr(self, name)}: out of range" for name, good in in_range.items() if not good]
        if problems:
            raise ValueError("; ".join(problems))

        # transformers 5.18 gave gradient_checkpointing a new name. The layers are run by this toolkit, not by it.
        self.recompute = self.gradient_checkpointing
        self.gradient_checkpointing = None
        if hasattr(self, "activation_checkpointing"):
            self.recompute = self.recompute if self.activation_checkpointing is None else self.activation_checkpointing
            self.activation_checkpointing = None
        self.bf16 = False  # no autocast: every layer knows its dtype
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 4 if on_gpu else 0
        self.dataloader_pin_memory &= on_gpu
        super().__post_init__()
        # One process drives one GPU; with several visible, Trainer would fall back to DataParallel.
        self._n_gpu = min(1, self.n_gpu)


def check_optimizer(args: FinetuneArguments) -> None:
    """Build the optimizer and the schedule for a single number, so that wrong flags end before the model is loaded.

    Raises:
        UserError: what they say.
    """
    try:
        optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **kwargs)
        warmup = args.get_warmup_steps(10)
        get_scheduler(args.lr_scheduler_type, optimizer, warmup, 10, scheduler_specific_kwargs=args.lr_scheduler_kwargs)
    except Exception as error:
        raise UserError(f"--optim {args.optim}, --lr_scheduler_type {args.lr_scheduler_type}: {error}") from error


def _summed_loss(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


class FinetuneTrainer(Trainer):
    """Trains an adapter on batches of `TrainingCollator`.

    Args:
        learning_rates: learning rates of parameters by a part of their name, such as {"vision_tower": 2e-6}; the
            others get `args.learning_rate`.
    """

    def __init__(self, *args, learning_rates: dict[str, float] | None = None, **kwargs):
        self.learning_rates = learning_rates or {}
        super().__init__(*args, **kwargs)
        self.callback_handler.callbacks = [
            c for c in self.callback_handler.callbacks if isinstance(c, DefaultFlowCallback)
        ] + [c for c in self.callback_handler.callbacks if "integrations" in type(c).__module__]
        self.add_callback(ProgressCallback())
        self.add_callback(GradientCheck(self))
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the labels of the whole accumulated batch
        self.seeds = Seeds(self.model)
        self.saw_images = False
        self._tokens = 0
        self._logged_at: float | None = None

    def use_packs(self, dataset: RecordDataset, packs: Sequence[Sequence[int]], pad_id: int, length: int | None = None):
        """Train on packs of the dataset's records (see `packing`), filled up to `length` tokens where it is given."""
        room = None if length is None else max(map(len, packs)) + 1
        self.train_dataset = PackedDataset(dataset, packs)
        self.data_collator = TrainingCollator(pad_id, length, room)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self._logged_at is None:
            self._logged_at = time.perf_counter()
        self._tokens += inputs.pop("num_tokens")
        self.saw_images |= "pixel_values" in inputs
        self.seeds.draw()
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Cross entropy of the labels, summed and divided by the labels of the whole accumulated batch.

        Logits are computed only where the next token has a label: with 131,072 ids they would otherwise be the largest
        tensor of all. Dividing by all labels, and not by those of each micro-batch, makes the gradient the same however
        a batch is split: https://github.com/huggingface/transformers/pull/34191
        """
        positions, labels = inputs.pop("label_positions"), inputs.pop("labels")
        core = model.get_base_model()
        hidden = core.model(**inputs, use_cache=False).last_hidden_state[0, positions]
        targets = labels[0, positions + 1]
        total = sum(
            checkpoint(_summed_loss, core.lm_head, *chunk, use_reentrant=False)
            for chunk in zip(hidden.split(LABELS_AT_ONCE), targets.split(LABELS_AT_ONCE), strict=True)
        )
        loss = total / (len(targets) if num_items_in_batch is None else num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    def create_optimizer(self, *args, **kwargs):
        """Trainer's optimizer, its parameter groups split by learning rate."""
        optimizer = super().create_optimizer(*args, **kwargs)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        groups = []
        for group in optimizer.param_groups:
            by_rate: dict[float, list] = {}
            for parameter in group["params"]:
                rates = [rate for part, rate in self.learning_rates.items() if part in names[parameter]]
                by_rate.setdefault(rates[0] if rates else group["lr"], []).append(parameter)
            groups += [group | {"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
        optimizer.param_groups[:] = groups
        return optimizer

    def log(self, logs, start_time=None):
        """Add tokens per second (without padding) since the last log, and stop at a loss that is not a number."""
        if "loss" in logs:
            now = time.perf_counter()
            logs["tokens_per_second"] = round(self._tokens / (now - self._logged_at), 1)
            self._tokens, self._logged_at = 0, now
            if not math.isfinite(logs["loss"]):
                raise UserError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}; start again, lower --learning_rate"
                )
        super().log(logs, start_time)


class GradientCheck(TrainerCallback):
    """Stops the run at its first step if something that should learn gets no gradient."""

    def __init__(self, trainer: FinetuneTrainer):
        self.trainer = trainer
        self.done = False

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.done:
            return
        # A batch of text alone gives the vision tower and the projector none, and that is right.
        missing = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
            and parameter.grad is None
            and (self.trainer.saw_images or not any(part in name for part in ("vision_tower", "multi_modal_projector")))
        ]
        assert not missing, f"{len(missing)} trainable tensors have no gradient, such as {missing[0]}"
        self.done = self.trainer.saw_images


class ProgressCallback(TrainerCallback):
    """Shows loss, learning rate and tokens/s at every log."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.progress = Progress("training", state.max_steps, "step", done=state.global_step)
        self.text = ""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            rate = logs["tokens_per_second"]
            self.text = f"loss {logs['loss']:.4f}, lr {logs.get('learning_rate', 0):.2e}, {rate:,.0f} tokens/s"
            self.progress.update(state.global_step - self.progress.done, self.text)

    def on_step_end(self, args, state, control, **kwargs):
        # A step that is logged is counted then, with its own loss.
        if not control.should_log:
            self.progress.update(state.global_step - self.progress.done, self.text)

    def on_train_end(self, args, state, control, **kwargs):
        self.progress.close()
