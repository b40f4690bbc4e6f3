"""What a run leaves in its folder while it goes: metrics.jsonl, loss.svg and status.json."""

import json
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from mistral_ft.distributed import rank
from mistral_ft.files import atomic_write
from mistral_ft.plots import loss_plot
from mistral_ft.status import PLOT_FILE, Status
from mistral_ft.training.callbacks import Args
from mistral_ft.training.evaluation import best_step

METRICS_FILE = "metrics.jsonl"


class RunLog(TrainerCallback):
    """Keeps the three files; of several processes the first one does.

    metrics.jsonl has a line for every log, {"step": …, "epoch": …, "loss": …} or the eval_loss and so on of an
    evaluation; a run that is continued drops the lines of steps that are made again.

    Args:
        folder: the run's.
        status: of the run.
    """

    def __init__(self, folder: Path, status: Status):
        self.folder, self.status = folder, status

    def on_train_begin(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.first, self.started = state.global_step, time.monotonic()
        self.status.update("training", step=state.global_step, steps=state.max_steps)
        if rank() == 0:
            with atomic_write(self.folder / METRICS_FILE) as file:
                file.writelines(json.dumps(entry) + "\n" for entry in state.log_history)

    def on_log(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = state.log_history[-1]
        if rank() == 0:
            with open(self.folder / METRICS_FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(logs) + "\n")
        if "loss" in logs:
            self._tell(state, loss=logs["loss"], tokens_per_second=logs["tokens_per_second"])

    def on_step_end(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._tell(state)

    def on_evaluate(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        found = state.log_history[-1]
        self._tell(state, **{name: value for name, value in found.items() if name.startswith("eval_")})
        self._plot(args, state)

    def on_save(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._tell(state)
        self._plot(args, state)

    def on_train_end(self, args: Args, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._plot(args, state)

    def _tell(self, state: TrainerState, **more: Any) -> None:
        made = state.global_step - self.first
        if made:
            each = (time.monotonic() - self.started) / made
            more["seconds_left"] = round(each * (state.max_steps - state.global_step))
        self.status.update("training", step=state.global_step, epoch=round(state.epoch or 0, 4), **more)

    def _plot(self, args: Args, state: TrainerState) -> None:
        if rank() == 0 and any("loss" in entry for entry in state.log_history):
            with atomic_write(self.folder / PLOT_FILE) as file:
                file.write(loss_plot(state.log_history, best_step(args, state)))
