"""Evaluation during training: the loss of records that are not learned, answers to some of them, and the best step."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from mistral_ft.data.collators import GroupCollator, PackBatches, PackedDataset, TrainingCollator
from mistral_ft.data.dataset import RecordDataset, RecordSize
from mistral_ft.data.packing import pack, round_up
from mistral_ft.data.pages import fingerprint
from mistral_ft.data.records import Record
from mistral_ft.data.row_keys import hash_json
from mistral_ft.data.splitting import Splitter
from mistral_ft.data.workers import Sending, batches, start_worker, usable_workers
from mistral_ft.distributed import gather, rank, vote, world_size
from mistral_ft.errors import UserError
from mistral_ft.model.device import limit_gib
from mistral_ft.prediction.batch_plan import ROWS_ON_CPU, plan_batches, tokens_that_fit
from mistral_ft.prediction.decoding import GreedyDecoder
from mistral_ft.progress import Progress
from mistral_ft.scoring.metrics import edit_counts, is_exact
from mistral_ft.training.arguments import BETTER_HIGH


def hold_out(records: Sequence[Record], fraction: float, seed: int) -> list[bool]:
    """For each record whether it is kept from training; those of one page, text or row are so together.

    Raises:
        UserError: if no such division leaves records on both sides.
    """
    splitter, hashes = Splitter(), {}
    for record in records:
        images = record.image_paths
        hashes |= {image: fingerprint(image) for image in images if image not in hashes}
        asked = hash_json([record.messages, record.text])
        splitter.add([(record.path, record.line), *([hashes[image] for image in images] or [asked])])
    held = splitter.divide(fraction, seed)
    if len(set(held)) == 1:
        raise UserError(
            f"--eval_fraction {fraction:g}: {len(records)} records cannot be divided so, for records of one page stay "
            "together; give another fraction, or --eval_dataset"
        )
    return held


def divide(
    records: Sequence[Record], sizes: Sequence[RecordSize], held: Sequence[bool]
) -> list[tuple[list[Record], list[RecordSize]]]:
    """Records and their sizes in two: those that are learned, and those that are held out."""
    rows = list(zip(records, sizes, held, strict=True))
    return [([r for r, _, h in rows if h == side], [s for _, s, h in rows if h == side]) for side in (False, True)]


class EvaluationStopped(Exception):
    """An evaluation was ended by a signal, and has found nothing."""


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

    def measure(self, trainer: Any) -> dict[str, float]:
        """What the model is worth now.

        Args:
            trainer: a `FinetuneTrainer`, whose loss, layout of records and model are used.

        Returns:
            eval_loss: cross entropy in nats, a mean over all labels. If records are answered, eval_exact_match: the
            share of right answers; eval_cer: edits per expected character (see `metrics.edit_counts`).

        Raises:
            EvaluationStopped: in all processes, soon after one of them got a signal.
        """
        model, device = trainer.model, trainer.args.device
        packs = self._packs(trainer)
        progress = Progress("evaluating", len(packs) + len(self.answered), "part", passing=True)
        model.eval()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
                found = {"eval_loss": self._loss(trainer, packs, progress)}
                return found | (self._answers(trainer, progress) if self.answered else {})
        finally:
            model.train()
            progress.close()

    def _packs(self, trainer: Any) -> list[list[int]]:
        tokens, self.length = [size.tokens for size in self.sizes], trainer.data_collator.length
        if self.length is None:
            return [[number] for number in range(len(tokens))]
        self.length = max(self.length, round_up(max(tokens)))
        return pack(tokens, self.length)

    def _loss(self, trainer: Any, packs: list[list[int]], progress: Progress) -> float:
        args, pad = trainer.args, self.dataset.processor.encoder.control.pad
        room = None if self.length is None else max(map(len, packs)) + 1
        loader = DataLoader(
            PackedDataset(self.dataset, packs),
            batch_sampler=PackBatches(len(packs), args.per_device_train_batch_size, seed=0),
            collate_fn=Sending(TrainingCollator(pad, self.length, room)),
            num_workers=usable_workers(args.dataloader_num_workers),
            pin_memory=args.dataloader_pin_memory,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # a loader draws a number: not from the training's
        )
        summed, labels = 0.0, 0
        for batch in batches(loader):
            labels += len(batch.label_positions)
            summed += trainer.compute_loss(trainer.model, batch.to(args.device), num_items_in_batch=1).item()
            progress.update(min(args.per_device_train_batch_size * world_size(), len(packs) - progress.done))
            _check_stop(trainer)
        everyones = gather((summed, labels))
        return sum(loss for loss, _ in everyones) / sum(count for _, count in everyones)

    def _answers(self, trainer: Any, progress: Progress) -> dict[str, float]:
        """Answers of the model as it is, the adapter unmerged; each process writes its share."""
        core, encoder, device = trainer.model.get_base_model(), self.dataset.processor.encoder, trainer.args.device
        # Longer than the longest answer that is expected, an answer is wrong anyway.
        longest = max(self.sizes[number].labels for number in self.answered)
        lengths = [self.sizes[number].tokens + longest for number in self.answered]
        text, most = core.config.get_text_config(), 2**63
        if device.type == "cuda":
            free = min(gather(limit_gib(device) * 2**30 - torch.cuda.memory_allocated(device)))
            most = tokens_that_fit(free, text, max(lengths))
        batches = plan_batches(lengths, ROWS_ON_CPU if device.type == "cpu" else len(lengths), most)
        training_attention = text._attn_implementation
        decoder = GreedyDecoder(core, encoder.control.eos, graphs=False)
        collate = GroupCollator(encoder.control.pad)
        hits = edits = characters = 0
        try:
            for start in range(0, len(batches), world_size()):
                batch = batches[start + rank()] if start + rank() < len(batches) else []
                numbers = [self.answered[index] for index in batch]
                prompts = collate([self.prompts[number] for number in numbers])
                ids = decoder.decode(prompts, longest, lambda: trainer.stop.requested)[0] if batch else []
                _check_stop(trainer)
                for number, answer in zip(numbers, map(encoder.decode, ids), strict=True):
                    expected = self.dataset.records[number].expected
                    found = edit_counts(answer, expected)
                    hits, edits = hits + is_exact(answer, expected), edits + found[0]
                    characters += found[1]
                progress.update(len(batch))
        finally:
            text._attn_implementation = training_attention
        hits, edits, characters = map(sum, zip(*gather((hits, edits, characters)), strict=True))
        return {"eval_exact_match": hits / len(self.answered), "eval_cer": edits / max(1, characters)}


def _check_stop(trainer: Any) -> None:
    if any(vote([trainer.stop.requested], trainer.args.device)):
        raise EvaluationStopped


def ends_epoch(state: Any) -> bool:
    """Whether a trainer's state is that after the last step of an epoch, or of the run."""
    return state.epoch == int(state.epoch) or state.global_step >= state.max_steps


def evaluation_is_due(args: Any, state: Any) -> bool:
    """Whether a `FinetuneArguments` asks for an evaluation at the step where a trainer's state is."""
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
    last = [entry for entry in history if f"eval_{metric}" in entry][-1]
    value, now = best[f"eval_{metric}"], last[f"eval_{metric}"]
    when = f"step {best['step']} (epoch {best['epoch']:.2g})"
    if best["step"] == last["step"]:
        return f"{name} was best at the end, {value:.4f} at {when}: the adapter is that of step {kept}"
    went = "grew no better" if now == value else "fell" if metric in BETTER_HIGH else "rose"
    told = f"{name} {went} after {when}, from {value:.4f} to {now:.4f}: the adapter is that of step {kept}"
    return told if kept == best["step"] else f"{told}; --load_best_model_at_end True keeps the best"
