"""The trainer: transformers' own, with a loss at label positions only and a line that says how it goes."""

import contextlib
import math
import pickle
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.trainer_callback import DefaultFlowCallback

from mistral_ft import checkpoints
from mistral_ft.arguments import changed_fields
from mistral_ft.data import PackBatches, PackedDataset, RecordDataset, TrainingCollator
from mistral_ft.distributed import gather, join, rank, sum_gradients, total, vote, world_size
from mistral_ft.errors import UserError
from mistral_ft.layers import Seeds
from mistral_ft.progress import Progress
from mistral_ft.stopping import Stop, Timer, leave_signals_to_the_parent

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
    "the loss is divided by the labels of all processes, their gradients are summed, nothing is wrapped": (
        "average_tokens_across_devices ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_static_graph accelerator_config parallelism_config deepspeed"
    ),
    "the base is sharded with --shard_base True": "fsdp fsdp_config",
    "each process prepares its own batches": "dataloader_multiprocessing_context dataloader_in_order ignore_data_skip",
    "a run has one folder, on a disk that all machines share": "save_on_each_node",
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
        self.use_cpu = not on_gpu  # else accelerate does not see that there are several processes
        join(self.ddp_timeout, on_gpu, self.ddp_backend)
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


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """Of torch's generators on the CPU and on the GPU in use."""
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


def _set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    for on_gpu in state[1:]:
        torch.cuda.set_rng_state(on_gpu)


def _summed_loss(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


class FinetuneTrainer(Trainer):
    """Trains an adapter on batches of `TrainingCollator`.

    Args:
        learning_rates: learning rates of parameters by a part of their name, such as {"vision_tower": 2e-6}; the
            others get `args.learning_rate`.
        save_minutes: save a checkpoint at the first step after so many minutes without one; None: by steps alone.

    Attributes:
        stop: entered while training; asks to save and end at the next step.
        stopped: whether training ended for that.
    """

    def __init__(
        self, *args, learning_rates: dict[str, float] | None = None, save_minutes: float | None = None, **kwargs
    ):
        self.learning_rates = learning_rates or {}
        super().__init__(*args, **kwargs)
        # Neither DistributedDataParallel nor accelerate's FSDP: `sum_gradients` and `shard_layers` do what they would.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.callback_handler.callbacks = [
            c for c in self.callback_handler.callbacks if isinstance(c, DefaultFlowCallback)
        ] + [c for c in self.callback_handler.callbacks if "integrations" in type(c).__module__]
        self.add_callback(ProgressCallback())
        self.add_callback(GradientCheck(self))
        self.add_callback(EpochCallback(self))
        self.add_callback(SaveCallback(self))
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the labels of the whole accumulated batch
        self.seeds = Seeds(self.model)
        # Dropout differs from process to process, and is that of a single one in the first.
        torch.manual_seed(self.args.seed + rank())
        self.stop, self.stopped, self.timer = Stop(), False, Timer(save_minutes)
        self.save_agreed = self.stop_agreed = False
        self.saw_images = False
        self._losses: list[torch.Tensor] = []  # of the micro-batches of this step
        self._staging: Path | None = None
        self._tokens = 0
        self._logged_at: float | None = None

    def use_packs(self, dataset: RecordDataset, packs: Sequence[Sequence[int]], pad_id: int, length: int | None = None):
        """Train on packs of the dataset's records (see `packing`), filled up to `length` tokens where it is given."""
        room = None if length is None else max(map(len, packs)) + 1
        self.train_dataset = PackedDataset(dataset, packs)
        self.data_collator = TrainingCollator(pad_id, length, room)

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The parameters that learn."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process's packs."""
        args = self.args
        self.batches = PackBatches(
            len(self.train_dataset),
            args.per_device_train_batch_size,
            args.seed if args.data_seed is None else args.data_seed,
            args.dataloader_drop_last,
        )
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            worker_init_fn=leave_signals_to_the_parent,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def train(self, *args, **kwargs):
        """Trainer's, which a signal ends at the next step, with a checkpoint."""
        run, saves = Path(self.args.output_dir), self.args.save_strategy != "no" or self.timer.seconds is not None
        if saves and rank() == 0:
            checkpoints.check_room(run, 2 * self.checkpoint_bytes())  # a new one is written before an old one goes
        with self.stop:
            try:
                return super().train(*args, **kwargs)
            except pickle.UnpicklingError:
                checkpoint = kwargs["resume_from_checkpoint"]
                raise UserError(f"{checkpoint}: holds something other than numbers, which is not opened") from None

    def _run_epoch(self, *args, **kwargs):
        """Trainer's, unless the run was over when it was resumed: Trainer would make one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples, device):
        """The labels of this step's batches in all processes."""
        count = sum(len(batch["label_positions"]) for batch in batch_samples)
        return total(count, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Trainer's; at the last micro-batch of a step the gradients become the sum of all processes'.

        Returns:
            The loss, times the number of processes: Trainer logs their mean, and each has its share of the sum.
        """
        if self._logged_at is None:
            self._logged_at = time.perf_counter()
        self._tokens += inputs.pop("num_tokens")
        self.saw_images |= "pixel_values" in inputs
        if not self._losses:
            self._random_state = _random_state(self.args.device)
        self.seeds.draw()
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError:
            self._rescue(model)
            raise
        self._losses.append(loss)
        if self.accelerator.sync_gradients:
            self._meet()
        return loss * world_size()

    def _rescue(self, model) -> None:
        """Save the last whole step if no memory is left for the next one; several processes cannot agree on it."""
        newest = checkpoints.newest_first(Path(self.args.output_dir))[:1]
        if world_size() > 1 or self.state.global_step in (0, *map(checkpoints.step_of, newest)):
            return
        model.zero_grad()
        torch.cuda.empty_cache()
        _set_random_state(self._random_state)
        with contextlib.suppress(UserError, torch.OutOfMemoryError):
            self._save_checkpoint(model, None)

    def _meet(self) -> None:
        """Agree with the other processes on the gradients, and on whether to save and to stop."""
        parameters = self.trained
        self.save_agreed, self.stop_agreed, self.saw_images, *learned = vote(
            [
                self.timer.due,
                self.stop.requested,
                self.saw_images,
                *(parameter.grad is not None for parameter in parameters),
            ],
            self.args.device,
        )
        sum_gradients(parameters, learned)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # A loss that is no number gives gradients that are none, and the sum of all processes' is none in each of them.
        if not math.isfinite(norm):
            self._refuse_step()
        self._losses.clear()
        return norm

    def _refuse_step(self) -> NoReturn:
        """End before a step that would spoil the weights.

        Raises:
            UserError: naming the records of the step; where a loss is no number, those of its micro-batches.
        """
        finite = [loss.isfinite().item() for loss in self._losses]
        in_a_loss = any(gather(not all(finite)))
        accumulation = self.args.gradient_accumulation_steps
        start = self.state.global_step % math.ceil(len(self.batches) / accumulation) * accumulation
        turns = self.batches.turns(start, start + accumulation)
        suspect = [not (good and in_a_loss) for good in finite]
        mine = [pack for batch, named in zip(turns, suspect, strict=True) if named for pack in batch]
        packed = self.train_dataset
        numbers = sorted(number for packs in gather(mine) for pack in packs for number in packed.packs[pack])
        named = [f"{packed.dataset.records[n].path}:{packed.dataset.records[n].line}" for n in numbers]
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        what = "loss" if in_a_loss else "gradient"
        raise UserError(
            f"the {what} of step {self.state.global_step + 1} is no finite number, the step was not made; its records: "
            f"{', '.join(named[:8])}{more}; look at them, or lower --learning_rate"
        )

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
        summed = sum(
            checkpoint(_summed_loss, core.lm_head, *chunk, use_reentrant=False)
            for chunk in zip(hidden.split(LABELS_AT_ONCE), targets.split(LABELS_AT_ONCE), strict=True)
        )
        loss = summed / (len(targets) if num_items_in_batch is None else num_items_in_batch)
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
        """Add tokens per second (without padding) of all processes since the last log."""
        if "loss" in logs:
            now = time.perf_counter()
            logs["tokens_per_second"] = round(total(self._tokens, self.args.device).item() / (now - self._logged_at), 1)
            self._tokens, self._logged_at = 0, now
        super().log(logs, start_time)

    def checkpoint_bytes(self) -> int:
        """What a checkpoint takes on the disk: the adapter and the optimizer's two moments in fp32, and some room."""
        return 13 * sum(parameter.numel() for parameter in self.trained) + 2**20

    def _save_checkpoint(self, model, trial):
        run, step, keep = Path(self.args.output_dir), self.state.global_step, self.args.save_total_limit
        with checkpoints.writing(run, step, self.checkpoint_bytes(), keep) as self._staging:
            super()._save_checkpoint(model, trial)
        self._staging = None
        self.timer.restart()

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)


class EpochCallback(TrainerCallback):
    """Gives each epoch its order."""

    def __init__(self, trainer: FinetuneTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.batches.epoch = int(state.epoch or 0)


class SaveCallback(TrainerCallback):
    """Saves and ends where the processes agreed to."""

    def __init__(self, trainer: FinetuneTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= self.trainer.save_agreed or self.trainer.stop_agreed
        if self.trainer.stop_agreed and state.global_step < state.max_steps:
            control.should_training_stop = self.trainer.stopped = True


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
