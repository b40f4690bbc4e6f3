"""All that a training was asked for, as one object."""

from collections.abc import Sequence
from dataclasses import dataclass

from mistral_ft.distributed import take_sharding
from mistral_ft.errors import UserError
from mistral_ft.model.rounding import FP8
from mistral_ft.training.arguments import (
    OURS,
    CheckpointArguments,
    DataArguments,
    EvaluationArguments,
    LoraArguments,
    ModelArguments,
    SpeedArguments,
    TrainParser,
)
from mistral_ft.training.training_arguments import FinetuneArguments


@dataclass
class Settings:
    """The arguments of train, under the names that run.json has for them."""

    data: DataArguments
    model: ModelArguments
    lora: LoraArguments
    evaluation: EvaluationArguments
    speed: SpeedArguments
    checkpoints: CheckpointArguments
    training: FinetuneArguments

    @classmethod
    def parse(cls, words: Sequence[str] | None = None) -> "Settings":
        """Those of the command line.

        Raises:
            UserError: one line for all that is wrong with them.
        """
        sharding = take_sharding()
        settings = cls(*TrainParser((*OURS, FinetuneArguments), prog="python -m train").parse(words))
        settings.speed.shard_base |= sharding
        if problems := settings.problems():
            raise UserError("; ".join(problems))
        training, evaluation = settings.training, settings.evaluation
        if evaluation.wanted and training.eval_strategy == "no":
            training.eval_strategy = "epoch"
        training.keep_best |= evaluation.early_stopping_patience is not None
        return settings

    def problems(self) -> list[str]:
        """Everything wrong with the arguments, one line each; of those that go together too."""
        found = self.model.problems() + self.lora.problems() + self.speed.problems() + self.checkpoints.problems()
        found += self.evaluation.problems(self.training, self.speed.shard_base)
        if self.speed.shard_base and self.lora.use_dora:
            found.append("--use_dora True needs whole layers, and --shard_base True has none; leave one of them out")
        if self.speed.shard_base and self.model.rounding:
            found.append(f"weights rounded to {self.model.rounding} are not sharded; leave out --shard_base")
        if self.lora.use_dora and self.model.rounding == FP8:
            found.append("--use_dora True needs the weights themselves, not --base_dtype fp8; leave one of them out")
        packing = self.speed.packing or (self.speed.packing is None and self.speed.pack_length is not None)
        if packing and self.training.per_device_train_batch_size > 1:
            found.append("--packing: a step holds one sequence; for more of them use --gradient_accumulation_steps")
        return found
