"""Evaluation during training: the loss of records that are not learned, answers to some of them, and the best step."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import TrainerState

from mistral_ft.data.collators import Batch, GroupCollator, PackBatches, PackedDataset, TrainingCollator
from mistral_ft.data.dataset import RecordDataset, RecordSize
from mistral_ft.data.packing import pack, round_up
from mistral_ft.data.workers import Sending, batches, start_worker, usable_workers
from mistral_ft.distributed import gather, rank, vote, world_size
from mistral_ft.model.device import limit_gib
from mistral_ft.prediction.batch_plan import ROWS_ON_CPU, plan_batches, tokens_that_fit
from mistral_ft.prediction.decoding import GreedyDecoder
from mistral_ft.progress import Progress
from mistral_ft.scoring.metrics import grade
from mistral_ft.training.arguments import BETTER_HIGH
from mistral_ft.training.training_arguments import FinetuneArguments


class EvaluationStopped(Exception):
    """An evaluation was ended by a signal, and has found nothing."""


@dataclass(frozen=True)
class Measuring:
    """How a trainer wants its model measured.

    Attributes:
        length: tokens of a packed sequence; None: records are not packed.
        summed_loss: the loss of a batch, summed over its labels.
        stop_requested: whether this process got a signal.
    """

    length: int | None
    summed_loss: Callable[[Batch], torch.Tensor]
    stop_requested: Callable[[], bool]

    def check_stop(self, device: torch.device) -> None:
        """Raises EvaluationStopped in all processes if one of them got a signal."""
        if any(vote([self.stop_requested()], device)):
            raise EvaluationStopped


class Evaluator:
    """Measures a model in training on records that it does not learn from.

    Weights, random state and results of the training are as they would be without it.

    Args:
        dataset: the records.
        sizes: of these.
        answered: how many of them are answered too: the same ones, drawn by lot, at every evaluation. Rows of plain
            text, which ask nothing, are none of them.
    """

    def __init__(self, dataset: RecordDataset, sizes: Sequence[RecordSize], answered: int):
        self.dataset, self.sizes = dataset, sizes
        asking = [number for number, record in enumerate(dataset.records) if record.text is None]
        self.answered = sorted(random.Random(0).sample(asking, min(answered, len(asking))))
        self.prompts = RecordDataset(dataset.records, dataset.processor, with_answers=False)

    def measure(self, model: PeftModel, args: FinetuneArguments, how: Measuring) -> dict[str, float]:
        """What the model is worth now.

        Args:
            model: with its adapter, unmerged.

        Returns:
            eval_loss: cross entropy in nats, a mean over all labels. If records are answered, eval_exact_match: the
            share of right answers; eval_cer: edits per expected character (see `metrics.grade`).

        Raises:
            EvaluationStopped: in all processes, soon after one of them got a signal.
        """
        device, packs = args.device, self._packs(how.length)
        progress = Progress("evaluating", len(packs) + len(self.answered), "part", passing=True)
        model.eval()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
                found = {"eval_loss": self._loss(args, how, packs, progress)}
                return found | (self._answers(model, args, how, progress) if self.answered else {})
        finally:
            model.train()
            progress.close()

    def _packs(self, length: int | None) -> list[list[int]]:
        tokens, self.length = [size.tokens for size in self.sizes], length
        if length is None:
            return [[number] for number in range(len(tokens))]
        self.length = max(length, round_up(max(tokens)))
        return pack(tokens, self.length)

    def _loss(self, args: FinetuneArguments, how: Measuring, packs: list[list[int]], progress: Progress) -> float:
        pad = self.dataset.processor.encoder.control.pad
        room = None if self.length is None else max(map(len, packs)) + 1
        loader = DataLoader(
            PackedDataset(self.dataset, packs),
            batch_sampler=PackBatches(len(packs), args.per_device_train_batch_size, seed=0),
            collate_fn=Sending(TrainingCollator(pad, self.length, room)),
            num_workers=usable_workers(args.dataloader_num_workers or 0),
            pin_memory=args.dataloader_pin_memory,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # a loader draws a number: not from the training's
        )
        summed, labels = 0.0, 0
        for batch in batches(loader):
            labels += len(batch.label_positions)
            summed += how.summed_loss(batch.to(args.device)).item()
            progress.update(min(args.per_device_train_batch_size * world_size(), len(packs) - progress.done))
            how.check_stop(args.device)
        everyones = gather((summed, labels))
        return sum(loss for loss, _ in everyones) / sum(count for _, count in everyones)

    def _answers(
        self, model: PeftModel, args: FinetuneArguments, how: Measuring, progress: Progress
    ) -> dict[str, float]:
        """Answers of the model as it is, the adapter unmerged; each process writes its share."""
        core: Any = model.get_base_model()
        encoder, device = self.dataset.processor.encoder, args.device
        # Longer than the longest answer that is right, an answer is wrong anyway.
        records = [self.dataset.records[number] for number in self.answered]
        others = [len(encoder.encode_text(text)[0]) - 1 for record in records for text in record.answers[1:]]
        longest = max([self.sizes[number].labels for number in self.answered] + others)
        lengths = [self.sizes[number].tokens + longest for number in self.answered]
        text, most = core.config.get_text_config(), 2**63
        if device.type == "cuda":
            free = min(gather(limit_gib(device) * 2**30 - torch.cuda.memory_allocated(device)))
            most = tokens_that_fit(free, text, max(lengths))
        batches = plan_batches(lengths, ROWS_ON_CPU if device.type == "cpu" else len(lengths), most)
        decoder = GreedyDecoder(core, encoder.control.eos, graphs=False)
        collate = GroupCollator(encoder.control.pad)
        hits = edits = characters = 0
        for start in range(0, len(batches), world_size()):
            batch = batches[start + rank()] if start + rank() < len(batches) else []
            numbers = [self.answered[index] for index in batch]
            prompts = collate([self.prompts[number] for number in numbers])
            ids = decoder.decode(prompts, longest, how.stop_requested)[0] if batch else []
            how.check_stop(device)
            for number, answer in zip(numbers, map(encoder.decode, ids), strict=True):
                found = grade({"expected": self.dataset.records[number].answers, "actual": answer})
                hits, edits = hits + found.hit, edits + found.char_edits
                characters += found.chars
            progress.update(len(batch))
        hits, edits, characters = map(sum, zip(*gather((hits, edits, characters)), strict=True))
        return {"eval_exact_match": hits / len(self.answered), "eval_cer": edits / max(1, characters)}


def ends_epoch(state: TrainerState) -> bool:
    """Whether a trainer's state is that after the last step of an epoch, or of the run."""
    return state.epoch == int(state.epoch) or state.global_step >= state.max_steps


def evaluation_is_due(args: FinetuneArguments, state: TrainerState) -> bool:
    """Whether the arguments ask for an evaluation at the step where a trainer's state is."""
    step = state.global_step
    if step == 0:
        return args.evaluate_first
    if step >= state.max_steps:
        return args.eval_strategy != "no"
    if args.eval_strategy == "steps":
        return step % state.eval_steps == 0 and step >= args.eval_delay
    return args.eval_strategy == "epoch" and ends_epoch(state) and state.epoch >= args.eval_delay


def best_evaluation(history: Sequence[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The best entry of a trainer's log by a metric, the first of equals; None if it has none after the first step."""
    found = [entry for entry in history if f"eval_{metric}" in entry and entry["step"] > 0]
    choose = max if metric in BETTER_HIGH else min
    return choose(found, key=lambda entry: entry[f"eval_{metric}"], default=None)


def best_step(args: FinetuneArguments, state: TrainerState) -> int | None:
    """The step of the best evaluation so far."""
    best = best_evaluation(state.log_history, args.metric_for_best_model)
    return best["step"] if best else None


def is_worn_out(history: Sequence[dict[str, Any]], metric: str, patience: int | None) -> bool:
    """Whether the last `patience` evaluations of a trainer's log were no better than one before; None: never."""
    best = best_evaluation(history, metric)
    if patience is None or best is None:
        return False
    return sum("eval_loss" in entry and entry["step"] > best["step"] for entry in history) >= patience


def describe(metrics: dict[str, float]) -> str:
    """An evaluation in words."""
    parts = [f"eval loss {metrics['eval_loss']:.4f}"]
    if "eval_exact_match" in metrics:
        parts += [f"exact match {metrics['eval_exact_match']:.3f}", f"CER {metrics['eval_cer']:.3f}"]
    return ", ".join(parts)


def verdict(history: Sequence[dict[str, Any]], metric: str, kept: int) -> str:
    """One sentence on when the model was best, and which step's adapter is kept.

    Args:
        history: a trainer's log, with at least one evaluation.
        kept: the step of the adapter.
    """
    best, name = best_evaluation(history, metric), metric.replace("exact_match", "exact match").replace("cer", "CER")
    name = "eval loss" if metric == "loss" else name
    assert best is not None  # there was an evaluation
    last = [entry for entry in history if f"eval_{metric}" in entry][-1]
    value, now = best[f"eval_{metric}"], last[f"eval_{metric}"]
    when = f"step {best['step']} (epoch {best['epoch']:.2g})"
    if best["step"] == last["step"]:
        return f"{name} was best at the end, {value:.4f} at {when}: the adapter is that of step {kept}"
    went = "grew no better" if now == value else "fell" if metric in BETTER_HIGH else "rose"
    told = f"{name} {went} after {when}, from {value:.4f} to {now:.4f}: the adapter is that of step {kept}"
    return told if kept == best["step"] else f"{told}; --load_best_model_at_end True keeps the best"
