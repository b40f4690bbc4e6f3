"""What happens at the moments of a training: at its steps, evaluations and logs. Files are kept by `run_log`."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from mistral_ft.data.collators import PackBatches
from mistral_ft.distributed import rank
from mistral_ft.progress import Progress
from mistral_ft.training.evaluation import best_evaluation, describe, ends_epoch, evaluation_is_due, is_worn_out

Args = Any  # a `FinetuneArguments`; transformers' own signatures have its base class


class Trainer(Protocol):
    """What callbacks know of the trainer.

    Attributes:
        batches: whose order is that of the epoch.
        saw_images: whether a batch of this step had any, in any process.
        save_agreed, stop_agreed: what the processes agreed to do at this step.
        save_due: whether the arguments ask for a checkpoint of this step, which the best step or a stop may need too.
    """

    batches: PackBatches
    saw_images: bool
    save_agreed: bool
    stop_agreed: bool
    save_due: bool

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        """The parameters that learn, by name."""

    def stop_here(self) -> None:
        """Save this step and end."""


class EpochCallback(TrainerCallback):
    """Gives each epoch its order, and does at its last step what is to be done at its end: a checkpoint knows of it."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_epoch_begin(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.batches.epoch = int(state.epoch or 0)

    def on_step_end(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_evaluate = evaluation_is_due(args, state)
        control.should_log |= args.logging_strategy == "epoch" and ends_epoch(state)
        control.should_save |= args.save_strategy == "epoch" and ends_epoch(state)

    def on_epoch_end(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_evaluate = control.should_save = False


class EvaluationCallback(TrainerCallback):
    """Says what an evaluation found, saves the best step, and ends what has long grown no better.

    Args:
        patience: evaluations in a row without a better one that end the run; None: it goes on.
    """

    def __init__(self, patience: int | None):
        self.patience = patience

    def on_evaluate(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if rank() == 0:
            Progress.print(f"step {state.global_step}: {describe(state.log_history[-1])}")
        best = best_evaluation(state.log_history, args.metric_for_best_model)
        control.should_save |= args.keep_best and best is not None and best["step"] == state.global_step
        control.should_training_stop |= is_worn_out(state.log_history, args.metric_for_best_model, self.patience)


class SaveCallback(TrainerCallback):
    """Saves and ends where the processes agreed to; comes after `EpochCallback`."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_step_end(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        control.should_save |= trainer.save_agreed
        trainer.save_due = control.should_save or args.save_strategy == "best"
        # An evaluation can wait until the run goes on; a run that is over need not.
        if trainer.stop_agreed and (state.global_step < state.max_steps or control.should_evaluate):
            trainer.stop_here()


class GradientCheck(TrainerCallback):
    """Stops the run at its first step if something that should learn gets no gradient."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.done = False

    def on_pre_optimizer_step(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.done:
            return
        # A batch of text alone gives the vision tower and the projector none, and that is right.
        missing = [
            name
            for name, parameter in self.trainer.trained.items()
            if parameter.grad is None
            and (self.trainer.saw_images or not any(part in name for part in ("vision_tower", "multi_modal_projector")))
        ]
        assert not missing, f"{len(missing)} trainable tensors have no gradient, such as {missing[0]}"
        self.done = self.trainer.saw_images


class ProgressCallback(TrainerCallback):
    """Shows loss, learning rate and tokens/s at every log."""

    def on_train_begin(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress = Progress("training", state.max_steps, "step", done=state.global_step)
        self.text = ""

    def on_log(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = state.log_history[-1]
        if "loss" in logs:
            rate = logs["tokens_per_second"]
            self.text = f"loss {logs['loss']:.4f}, lr {logs.get('learning_rate', 0):.2e}, {rate:,.0f} tokens/s"
            self.progress.update(state.global_step - self.progress.done, self.text)

    def on_step_end(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # A step that is logged is counted then, with its own loss.
        if not control.should_log:
            self.progress.update(state.global_step - self.progress.done, self.text)

    def on_train_end(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.close()
