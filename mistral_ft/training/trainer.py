"""The trainer: transformers' own, with a loss at label positions only and a line that says how it goes."""

import contextlib
import math
import pickle
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_callback import DefaultFlowCallback, TrainerCallback
from transformers.trainer_utils import TrainOutput

from mistral_ft.data.collators import Batch, PackBatches, PackedDataset, TrainingCollator
from mistral_ft.data.dataset import RecordDataset
from mistral_ft.data.workers import Sending, WorkerLost, start_worker, usable_workers, waiting_for_workers
from mistral_ft.distributed import from_first, rank, sum_gradients, total, vote, world_size
from mistral_ft.errors import UserError
from mistral_ft.folders import ADAPTER_WEIGHTS
from mistral_ft.model.layers import EmbeddingNoise, Seeds
from mistral_ft.prediction.losses import label_chunks
from mistral_ft.status import Status
from mistral_ft.training import checkpoints
from mistral_ft.training.callbacks import (
    EpochCallback,
    EvaluationCallback,
    GradientCheck,
    ProgressCallback,
    SaveCallback,
)
from mistral_ft.training.evaluation import (
    EvaluationStopped,
    Evaluator,
    Measuring,
    best_step,
    evaluation_is_due,
    is_worn_out,
    verdict,
)
from mistral_ft.training.optimizer import split_by_rate
from mistral_ft.training.random_state import random_state, set_random_state
from mistral_ft.training.refusal import refuse_step
from mistral_ft.training.run_log import RunLog
from mistral_ft.training.signals import Stop, Timer
from mistral_ft.training.training_arguments import FinetuneArguments


def _summed_loss(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


class FinetuneTrainer(Trainer):
    """Trains an adapter on batches of `TrainingCollator`.

    Args:
        b_rate_ratio: LoRA+ (Hayou et al. 2024): how many times their learning rate the adapter's B matrices get.
        learning_rates: learning rates of parameters by a part of their name, such as {"vision_tower": 2e-6}; the
            others get `args.learning_rate`.
        save_minutes: save a checkpoint at the first step after so many minutes without one; None: by steps alone.
        status: where it is told what is being done; None: in the output folder.
        trackers: callbacks of `trackers.tracking`.
        evaluator: what is measured, at the steps that the arguments name; None: nothing is.
        patience: of `EvaluationCallback`.

    Attributes:
        stop: entered while training; asks to save and end at the next step.
        stopped: whether training ended for that.
        save_due: whether the arguments ask for a checkpoint of this step, which the best step or a stop may need too.
    """

    model: PeftModel
    args: FinetuneArguments
    train_dataset: PackedDataset
    data_collator: TrainingCollator  # type: ignore[assignment]  # makes a `Batch`, where Trainer has a dict
    optimizer: torch.optim.Optimizer  # once it is created

    def __init__(
        self,
        model: PeftModel,
        args: FinetuneArguments,
        status: Status | None = None,
        trackers: Sequence[TrainerCallback] = (),
        learning_rates: dict[str, float] | None = None,
        b_rate_ratio: float = 1,
        save_minutes: float | None = None,
        evaluator: Evaluator | None = None,
        patience: int | None = None,
    ):
        self.learning_rates, self.b_rate_ratio = learning_rates or {}, b_rate_ratio
        self.evaluator, self.patience = evaluator, patience
        super().__init__(model, args, eval_dataset=evaluator.dataset if evaluator else None)
        self.folder = Path(args.output_dir or "")
        self.status = status or Status(self.folder)
        # Neither DistributedDataParallel nor accelerate's FSDP: `sum_gradients` and `shard_layers` do what they would.
        self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        # Of Trainer's own; it would make trackers too, later than `tracking` does.
        self.callback_handler.callbacks = [
            c for c in self.callback_handler.callbacks if isinstance(c, DefaultFlowCallback)
        ]
        for callback in (
            *trackers,
            ProgressCallback(),
            GradientCheck(self),
            EpochCallback(self),
            SaveCallback(self),
            EvaluationCallback(patience),
            RunLog(self.folder, self.status),
        ):
            self.add_callback(callback)
        self.loss_is_scaled_for_ga = True  # compute_loss divides by the labels of the whole accumulated batch
        self.seeds = Seeds(model)
        self.noise = EmbeddingNoise(model.get_base_model(), args.noise) if args.noise else None
        # Dropout differs from process to process, and is that of a single one in the first.
        torch.manual_seed(args.seed + rank())
        self.stop, self.stopped, self.timer = Stop(), False, Timer(save_minutes)
        self.save_agreed = self.stop_agreed = self.save_due = False
        self.saw_images = False
        self._losses: list[torch.Tensor] = []  # of the micro-batches of this step
        self._staging: Path | None = None
        self._tokens = 0
        self._logged_at: float | None = None
        self._began_at: int | None = None  # the step that a run which is continued had reached, else 0

    def use_packs(
        self, dataset: RecordDataset, packs: Sequence[Sequence[int]], pad_id: int, length: int | None = None
    ) -> None:
        """Train on packs of the dataset's records (see `packing`), filled up to `length` tokens where it is given."""
        room = None if length is None else max(map(len, packs)) + 1
        self.train_dataset = PackedDataset(dataset, packs)
        self.data_collator = TrainingCollator(pad_id, length, room)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this process's packs."""
        args = self.args
        self.batches = PackBatches(
            len(self.train_dataset),
            args.per_device_train_batch_size,
            args.seed if args.data_seed is None else args.data_seed,
            args.dataloader_drop_last,
        )
        workers = usable_workers(args.dataloader_num_workers or 0)
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batches,
            collate_fn=Sending(self.data_collator),
            num_workers=workers,
            worker_init_fn=start_worker,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers and workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's, which a signal ends at the next step, with a checkpoint."""
        saves = self.args.save_strategy != "no" or self.timer.seconds is not None or self.args.keep_best
        if saves and rank() == 0:
            # A new one is written before an old one goes.
            checkpoints.check_room(self.folder, 2 * self.checkpoint_bytes())
        with self.stop:
            try:
                return super().train(*args, **kwargs)
            except pickle.UnpicklingError:
                checkpoint = kwargs["resume_from_checkpoint"]
                raise UserError(f"{checkpoint}: holds something other than numbers, which is not opened") from None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, unless the run was over when it was resumed: Trainer would make one step more."""
        self._begin()
        worn_out = is_worn_out(self.state.log_history, self.args.metric_for_best_model, self.patience)
        if self.state.global_step < self.state.max_steps and not (self.stopped or worn_out):
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trainer's; a run that was over at the end of an epoch had none to run."""
        self._begin()
        return super()._finalize_training(*args, **kwargs)

    def _begin(self) -> None:
        """Once: evaluate, if that is due at the step where the run begins and was not done before it was stopped."""
        if self._began_at is not None:
            return
        step = self._began_at = self.state.global_step
        done = any("eval_loss" in entry and entry["step"] == step for entry in self.state.log_history)
        if evaluation_is_due(self.args, self.state) and not done:
            self._evaluate(None, None, skip_scheduler=step == 0)

    def stop_here(self) -> None:
        """Save this step and end; an evaluation that is due is made when the run goes on."""
        self.control.should_evaluate = False
        self.control.should_save = self.control.should_training_stop = self.stopped = True

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """The labels of this step's batches in all processes."""
        count = sum(len(batch.label_positions) for batch in batch_samples)
        return total(count, device)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], Any]:
        """Trainer's; if a worker process has died, the last whole step is saved."""
        try:
            with waiting_for_workers():
                return super().get_batch_samples(*args, **kwargs)
        except WorkerLost as error:
            saved = f"step {self.state.global_step} is saved, " if self._rescue(self.model) else ""
            raise UserError(f"{error} {saved}go on with a smaller --dataloader_num_workers, or 0") from None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Trainer's; at the last micro-batch of a step the gradients become the sum of all processes'.

        Returns:
            The loss, times the number of processes: Trainer logs their mean, and each has its share of the sum.
        """
        if self._logged_at is None:
            self._logged_at = time.perf_counter()
        self._tokens += inputs.num_tokens
        self.saw_images |= inputs.pixel_values is not None
        if not self._losses:
            self._random_state = random_state(self.args.device)
        self.seeds.draw()
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except torch.OutOfMemoryError:
            set_random_state(self._random_state)
            self._rescue(model)
            raise
        self._losses.append(loss)
        if self.accelerator.sync_gradients:
            self._meet()
        return loss * world_size()

    def _rescue(self, model: nn.Module) -> bool:
        """Save the last whole step if the next one cannot be made; several processes cannot agree on it.

        Returns:
            Whether there is a checkpoint of it.
        """
        step, newest = self.state.global_step, checkpoints.newest_first(self.folder)[:1]
        if step in map(checkpoints.step_of, newest):
            return True
        if world_size() > 1 or step == 0:
            return False
        model.zero_grad()
        torch.cuda.empty_cache()
        with contextlib.suppress(UserError, torch.OutOfMemoryError):
            self._save_checkpoint(model, None)
            return True
        return False

    def _meet(self) -> None:
        """Agree with the other processes on the gradients, and on whether to save and to stop."""
        parameters = list(self.trained.values())
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

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float | None:
        norm = super()._get_grad_norm(model, grad_norm)
        # A loss that is no number gives gradients that are none, and the sum of all processes' is none in each of them.
        if norm is not None and not math.isfinite(norm):
            finite = [bool(loss.isfinite()) for loss in self._losses]
            accumulation = self.args.gradient_accumulation_steps
            refuse_step(self.state.global_step, finite, self.batches, self.train_dataset, accumulation)
        self._losses.clear()
        return norm

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The batch on the trainer's device."""
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: Any) -> int:
        """Trainer's count."""
        return super().floating_point_ops(inputs.model_inputs())

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross entropy of the labels, summed and divided by the labels of the whole accumulated batch.

        Dividing by all labels, and not by those of each micro-batch, makes the gradient the same however a batch is
        split: https://github.com/huggingface/transformers/pull/34191
        """
        core: Any = self.model.get_base_model()
        if self.noise:
            self.noise.bounds = inputs.cu_seq_lens
        losses = [
            checkpoint(_summed_loss, core.lm_head, *chunk, use_reentrant=False)  # its logits are computed again
            for chunk in label_chunks(core, inputs)
        ]
        labels = len(inputs.label_positions) if num_items_in_batch is None else num_items_in_batch
        loss = torch.stack(losses).sum() / labels
        return (loss, {"loss": loss}) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's optimizer, its parameter groups split by learning rate."""
        optimizer = super().create_optimizer(*args, **kwargs)
        split_by_rate(optimizer, self.trained, self.learning_rates, self.b_rate_ratio)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add tokens per second (without padding) of all processes since the last log."""
        if "loss" in logs:
            assert self._logged_at is not None  # a step was trained
            now = time.perf_counter()
            logs["tokens_per_second"] = round(total(self._tokens, self.args.device).item() / (now - self._logged_at), 1)
            self._tokens, self._logged_at = 0, now
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """What the evaluator measures, logged."""
        started = time.perf_counter()
        self.status.update("evaluating")
        assert self.evaluator is not None  # nothing else asks for an evaluation
        how = Measuring(
            length=self.data_collator.length,
            summed_loss=lambda batch: self.compute_loss(self.model, batch, num_items_in_batch=1),
            stop_requested=lambda: self.stop.requested,
        )
        metrics = self.evaluator.measure(self.model, self.args, how)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self._logged_at is not None:
            self._logged_at += time.perf_counter() - started  # it is no time of training
        return metrics

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationStopped:
            self.stop_here()
            return None

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether to save with --save_strategy best; Trainer's own would have it remove checkpoints by itself."""
        return self.control.should_save or self.best_step == self.state.global_step

    @property
    def best_step(self) -> int | None:
        """The step of the best evaluation so far."""
        return best_step(self.args, self.state)

    def choose_adapter(self) -> None:
        """After training: take the adapter of the best evaluation, if that is wanted, and say which one it is."""
        best, kept = self.best_step, self.state.global_step
        if best is None:
            return
        if self.args.keep_best and best != kept:
            checkpoint = self.folder / f"checkpoint-{best}"
            if problem := checkpoints.fault(checkpoint):
                print(f"warning: {checkpoint}: the best step cannot be restored, {problem}", file=sys.stderr)
            else:
                set_peft_model_state_dict(self.model, load_file(checkpoint / ADAPTER_WEIGHTS))
                kept = best
        print(verdict(self.state.log_history, self.args.metric_for_best_model, kept))

    def clear_up(self) -> None:
        """When the adapter is saved: remove checkpoints that were only there to get so far."""
        if self.args.save_strategy == "no":
            from_first(lambda: checkpoints.remove_all_unless_due(self.folder))

    def checkpoint_bytes(self) -> int:
        """What a checkpoint takes on the disk: the adapter and the optimizer's two moments in fp32, and some room."""
        return 13 * sum(parameter.numel() for parameter in self.trained.values()) + 2**20

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run, step = self.folder, self.state.global_step
        self.status.update("saving")
        with checkpoints.writing(run, step, self.checkpoint_bytes(), self.save_due) as self._staging:
            super()._save_checkpoint(model, trial)
        self._staging = None
        limit, best = self.args.save_total_limit, self.best_step if self.args.keep_best else None
        from_first(lambda: checkpoints.remove_old(run, step, limit, best, self._began_at))
        self.timer.restart()

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)
