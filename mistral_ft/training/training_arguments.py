"""transformers' TrainingArguments with this toolkit's defaults, and what of them cannot act here."""

import math
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from mistral_ft.distributed import join
from mistral_ft.errors import UserError
from mistral_ft.model.gpus import ON_CPU, use_gpu
from mistral_ft.training.arguments import BETTER_HIGH, METRICS, changed_fields

# TrainingArguments that cannot act here, each with the reason. Whoever sets one is told instead of ignored.
REFUSED = {
    "evaluation lays out records as training does, and keeps sums only (see --eval_dataset)": (
        "do_eval do_predict eval_accumulation_steps eval_do_concat_batches eval_use_gather_object "
        "per_device_eval_batch_size prediction_loss_only batch_eval_metrics include_for_metrics bf16_full_eval "
        "fp16_full_eval"
    ),
    "which way is better is known of each --metric_for_best_model": "greater_is_better",
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
        keep_best: whether the adapter of the best evaluation is the one that is kept.
        evaluate_first: whether to evaluate before the first step too.
        trackers: the names of --report_to.
        recorded: what trackers are told instead of, and beside, these arguments as they were changed here.
        noise: of NEFTune, see `EmbeddingNoise`; None: without.
    """

    output_dir: str | None = "output"
    per_device_train_batch_size: int = 1
    logging_steps: float = 1
    logging_nan_inf_filter: bool = False  # a loss that is not a number is never hidden
    remove_unused_columns: bool = False
    # It says what is so anyway: bfloat16 on a GPU, float32 on a CPU.
    bf16: bool | None = None  # type: ignore[assignment]
    gradient_checkpointing: bool | None = None  # default: as many layers as the GPU's memory asks for
    # Default: 4 with a GPU, which is faster than pages are read.
    dataloader_num_workers: int | None = None  # type: ignore[assignment]
    metric_for_best_model: str = "loss"

    def __post_init__(self) -> None:
        """Raises ValueError, one line for all arguments that cannot act here.

        What transformers derives from the machine and the other processes waits for `begin`: parsing joins nobody.
        """
        self.given = changed_fields(self)  # before anything is derived from the machine or the libraries' state
        problems = [
            f"--{name}: {reason}" for reason, names in REFUSED.items() for name in names.split() if name in self.given
        ]
        on_gpu = use_gpu(self.use_cpu, f"{ON_CPU} or give --use_cpu True")
        if self.report_to in ("all", ["all"]):
            problems.append("--report_to all: name the trackers, such as --report_to tensorboard")
        if self.bf16 is not None and self.bf16 != on_gpu:
            problems.append(f"--bf16 {self.bf16}: the base is trained in bfloat16 on a GPU and in float32 on a CPU")
        kwargs = getattr(self, "activation_checkpointing_kwargs", None) or self.gradient_checkpointing_kwargs
        if (isinstance(kwargs, dict) and kwargs.get("use_reentrant")) or 'use_reentrant": true' in str(kwargs).lower():
            problems.append("checkpointing is never re-entrant: that loses the vision tower's gradient")
        self.metric_for_best_model = self.metric_for_best_model.removeprefix("eval_")
        if self.metric_for_best_model not in METRICS:
            problems.append(
                f"--metric_for_best_model {self.metric_for_best_model}: must be one of {', '.join(METRICS)}"
            )
        self.greater_is_better = self.metric_for_best_model in BETTER_HIGH
        if self.eval_steps is not None and "eval_strategy" not in self.given:
            self.eval_strategy = "steps"
        if self.eval_strategy == "steps" and self.eval_steps is None:
            problems.append("--eval_strategy steps needs --eval_steps")
        in_range = {
            "max_steps": self.max_steps == -1 or self.max_steps >= 1,
            "num_train_epochs": self.max_steps > 0 or 0 < self.num_train_epochs < math.inf,
            "per_device_train_batch_size": self.per_device_train_batch_size >= 1,
            "gradient_accumulation_steps": self.gradient_accumulation_steps >= 1,
            "neftune_noise_alpha": self.neftune_noise_alpha is None or 0 < self.neftune_noise_alpha < math.inf,
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
        # Trainer's own way would need evaluations and checkpoints at the same steps, and saves before it compares.
        self.keep_best, self.load_best_model_at_end = self.load_best_model_at_end, False
        # Trainer's own would evaluate when a run is continued, too.
        self.evaluate_first, self.eval_on_start = self.eval_on_start, False
        # Trainer's own takes a sequence for a record.
        self.noise, self.neftune_noise_alpha = self.neftune_noise_alpha, None
        self.bf16 = False  # no autocast: every layer knows its dtype
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = 4 if on_gpu else 0
        self.dataloader_pin_memory &= on_gpu
        self.use_cpu = not on_gpu  # else accelerate does not see that there are several processes
        trackers = [] if self.report_to in (None, "none", []) else self.report_to
        self.trackers = trackers.split(",") if isinstance(trackers, str) else list(trackers or ())
        self.recorded: dict[str, Any] = {}

    def begin(self) -> "FinetuneArguments":
        """Join the other processes, take this one's GPU, and derive what transformers does.

        Raises:
            UserError: for values that transformers refuses.
        """
        join(self.ddp_timeout, not self.use_cpu, self.ddp_backend)
        try:
            super().__post_init__()
        except (ValueError, ImportError) as error:
            raise UserError(str(error)) from error
        self.report_to = self.trackers  # not one more because of what the machine's environment says
        # One process drives one GPU; with several visible, Trainer would fall back to DataParallel.
        self._n_gpu = min(1, self.n_gpu)
        return self

    def to_dict(self) -> dict[str, Any]:
        """All arguments as trackers record them."""
        return super().to_dict() | self.recorded
