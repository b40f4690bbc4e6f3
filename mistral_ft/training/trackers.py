"""Trackers of --report_to (TensorBoard, W&B, trackio, MLflow), through the callbacks that transformers has for them."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from mistral_ft.distributed import rank
from mistral_ft.errors import UserError
from mistral_ft.training.settings import Settings
from mistral_ft.training.training_arguments import FinetuneArguments

# Those that say at once whether they can be used: a login or a server may be missing.
SET_UP_EARLY = ("wandb", "trackio", "mlflow")


def check_trackers(args: FinetuneArguments) -> None:
    """Raises UserError if a tracker of --report_to is unknown, or its package is not installed."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # else it calls home when it is imported
    for name in args.trackers:
        try:
            for tracker in get_reporting_integration_callbacks([name]):
                tracker()
        except (ImportError, RuntimeError, ValueError) as error:
            raise UserError(f"--report_to {name}: {error}") from None


@contextlib.contextmanager
def tracking(settings: Settings, folder: Path, step: int) -> Iterator[list[TrainerCallback]]:
    """Callbacks for the trackers of --report_to, whose runs begin now and end with the context.

    Of several processes the first one has them. They are told all settings, the toolkit's own too; whether the run was
    finished, stopped or failed; and keep what is the run's alone in its folder. What is common to runs (MLflow's and
    trackio's stores) stays where these tools look for it.

    Args:
        folder: the run's.
        step: the one to go on from, 0 for a new run.

    Raises:
        UserError: if a tracker cannot be used.
    """
    args = settings.training
    ours = [dataclasses.asdict(arguments) for name, arguments in vars(settings).items() if name != "training"]
    args.recorded = {name: value for group in ours for name, value in group.items()}
    args.recorded |= args.given | {"output_dir": args.output_dir}
    trackers: dict[str, TrainerCallback] = {}
    state = "FAILED"
    try:
        for name in args.trackers if rank() == 0 else ():
            try:
                trackers[name] = _start(name, args, folder, step)
            except Exception as error:  # whatever a library raises without a login, a server or a disk
                raise UserError(f"--report_to {name}: {' '.join(str(error).split())}") from None
        yield list(trackers.values())
        state = "FINISHED"
    except KeyboardInterrupt:
        state = "KILLED"
        raise
    finally:
        _end(trackers, state)


def _start(name: str, args: FinetuneArguments, folder: Path, step: int) -> Any:
    (kind,) = get_reporting_integration_callbacks([name])
    if name == "tensorboard":
        try:
            tensorboard = import_module("torch.utils.tensorboard")
        except ImportError:
            tensorboard = import_module("tensorboardX")
        # One curve, also of a run that goes on: the steps that are made again are dropped.
        where = os.environ.get("TENSORBOARD_LOGGING_DIR", folder / "tensorboard")
        return kind(tensorboard.SummaryWriter(str(where), purge_step=step + 1 if step else None))
    if name == "wandb":
        os.environ.setdefault("WANDB_DIR", str(folder))
    tracker = kind()
    if name in SET_UP_EARLY:
        tracker.setup(args, TrainerState(), None)
    if name == "mlflow":
        tracker._auto_end_run = False  # it would call every run finished
    return tracker


def _end(trackers: dict[str, Any], state: str) -> None:
    """End what is still open, before the folder of a run that failed is removed. A run is not lost for a tracker."""
    for name, tracker in trackers.items():
        try:
            if name == "tensorboard" and tracker.tb_writer:
                tracker.tb_writer.close()
            elif name == "wandb":
                tracker._wandb.finish(exit_code=int(state != "FINISHED"))
            elif name == "mlflow":
                tracker._ml_flow.end_run(state)
        except Exception as error:  # a server that went away, a full disk
            print(f"warning: --report_to {name}: {' '.join(str(error).split())}", file=sys.stderr)
