"""What happens at the moments of a training: at its steps, evaluations and logs. Files are kept by `run_log`."""

from typing import Any

from transformers import TrainerCallback

from mistral_ft.distributed import rank
from mistral_ft.progress import Progress
from mistral_ft.training.evaluation import best_evaluation, describe, ends_epoch, evaluation_is_due, is_worn_out


class EpochCallback(TrainerCallback):
    """Gives each epoch its order, and does at its last step what is to be done at its end: a checkpoint knows of it."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.batches.epoch = int(state.epoch or 0)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = evaluation_is_due(args, state)
        control.should_log |= args.logging_strategy == "epoch" and ends_epoch(state)
        control.should_save |= args.save_strategy == "epoch" and ends_epoch(state)

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_evaluate = control.should_save = False


class EvaluationCallback(TrainerCallback):
    """Says what an evaluation found, saves the best step, and ends what has long grown no better.

    Args:
        patience: evaluations in a row without a better one that end the run; None: it goes on.
    """

    def __init__(self, patience: int | None):
        self.patience = patience

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if rank() == 0:
            Progress.print(f"step {state.global_step}: {describe(metrics)}")
        best = best_evaluation(state.log_history, args.metric_for_best_model)
        control.should_save |= args.keep_best and best is not None and best["step"] == state.global_step
        control.should_training_stop |= is_worn_out(state.log_history, args.metric_for_best_model, self.patience)


class SaveCallback(TrainerCallback):
    """Saves and ends where the processes agreed to; comes after `EpochCallback`."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        control.should_save |= trainer.save_agreed
        trainer.save_due = control.should_save or args.save_strategy == "best"
        # An evaluation can wait until the run goes on; a run that is over need not.
        if trainer.stop_agreed and (state.global_step < state.max_steps or control.should_evaluate):
            trainer.stop_here()


class GradientCheck(TrainerCallback):
    """Stops the run at its first step if something that should learn gets no gradient."""

    def __init__(self, trainer: Any):
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
