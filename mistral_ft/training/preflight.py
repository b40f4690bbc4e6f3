"""What the card has room for, tried out before the first step: no run ends in an out-of-memory error hours later."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.fsdp import FSDPModule

from mistral_ft.data.collators import Batch
from mistral_ft.data.dataset import RecordDataset, RecordSize
from mistral_ft.data.packing import activation_bytes, choose_length, pack, round_up
from mistral_ft.distributed import gather, world_size
from mistral_ft.errors import UserError
from mistral_ft.model.attention import PACKED
from mistral_ft.model.device import limit_gib
from mistral_ft.model.layers import LayerRunner, set_up_compiler
from mistral_ft.model.loading import text_model
from mistral_ft.training.arguments import SpeedArguments
from mistral_ft.training.trainer import FinetuneTrainer

# Packed sequences on a CPU, where memory sets no limit, are as long as on an 80 GB card.
TOKENS_ON_CPU = 4096
# GiB that a trial must leave free: the allocator's holes grow a little over a run.
SPARE_GIB = 0.75


def tokens_without_recomputation(model: PeftModel, device: torch.device) -> int:
    """How long a sequence may be, by estimate, for its activations to be kept; the trial run has the last word."""
    base: Any = model.get_base_model()
    config = base.config.get_text_config()
    kept, at_work = activation_bytes(config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Still to come for what is trained: gradients and Adam's two moments in fp32.
    free = min(gather(limit_gib(device) * 2**30 - torch.cuda.memory_allocated(device) - 12 * trained))
    return int((free - (SPARE_GIB + 1) * 2**30) / (kept + at_work))


@dataclass(frozen=True)
class Trial:
    """A plan that was tried: how many layers were computed twice, and what it took. `peak_gib` None: it did not fit."""

    recomputed: int
    offloaded: bool
    peak_gib: float | None
    seconds: float

    def __str__(self) -> str:
        where = ", inputs in RAM" if self.offloaded else ""
        outcome = "out of memory" if self.peak_gib is None else f"{self.peak_gib:5.1f} GiB, {self.seconds:.1f} s"
        return f"  {self.recomputed:2d} layers computed twice{where}: {outcome}"


def plan_layers(layers: int, limit: float, run: Callable[[int, bool], Trial]) -> list[Trial]:
    """Try plans from the safest on, and find the fewest layers to compute twice.

    Three trials give the memory of one more layer, from that follows the plan, and a last trial proves it.

    Args:
        layers: how many there are.
        limit: GiB that a trial's peak may reach.
        run: tries a number of layers to compute twice, and whether their inputs are offloaded.

    Returns:
        The trials; the last is the plan, and one that does not fit if nothing does.
    """

    def fits(trial: Trial) -> bool:
        return trial.peak_gib is not None and trial.peak_gib <= limit

    trials = [run(layers, False)]
    if not fits(trials[0]):
        return [*trials, run(layers, True)]
    # The first layers that are kept partly fill memory that recomputing needs at another time: they tell too little.
    few = max(1, layers // 10)
    for recomputed in range(layers - few, max(layers - 3 * few, -1), -few):
        trials.append(run(recomputed, False))
        if not fits(trials[-1]):
            return [*trials, trials[-2]]
    before, last = trials[-2:]
    assert before.peak_gib is not None  # both fit
    assert last.peak_gib is not None
    each = max((last.peak_gib - before.peak_gib) / (before.recomputed - last.recomputed), 1e-3)
    recomputed = max(0, last.recomputed - int((limit - last.peak_gib) / each))
    while recomputed < last.recomputed:
        trials.append(run(recomputed, False))
        if fits(trials[-1]):
            return trials
        recomputed += max(1, layers // 20)
    return trials if trials[-1] is last else [*trials, last]


class Preflight:
    """Trains on the largest batches without a trace: weights, optimizer and random state are as before.

    Args:
        trainer: knows the loss and the optimizer.
        runners: of the text layers, and of the vision tower's if there is one.
        batches: what to try, as the trainer's collator makes it.
    """

    def __init__(self, trainer: FinetuneTrainer, runners: Sequence[LayerRunner], batches: Sequence[Batch]):
        self.trainer, self.runners, self.batches = trainer, runners, batches
        self.device = trainer.args.device

    def find_plan(self, fixed: int | None = None) -> bool:
        """Set the text layers' runner to the fastest plan that fits, and say what was tried.

        Args:
            fixed: layers to compute twice, if the user says so.

        Returns:
            Whether any plan fits.
        """
        parameters = self.trainer.trained.values()
        weights = [p.detach().cpu().clone() for p in parameters]
        optimizer = self.trainer.create_optimizer()
        limit = min(gather(limit_gib(self.device))) - SPARE_GIB
        try:
            trials = (
                [self.run(fixed, False)] if fixed is not None else plan_layers(self.runners[0].count, limit, self.run)
            )
        finally:
            with torch.no_grad():
                for parameter, weight in zip(parameters, weights, strict=True):
                    parameter.copy_(weight)
            optimizer.state.clear()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        plan = trials[-1]
        self.runners[0].recomputed, self.runners[0].offloaded = plan.recomputed, plan.offloaded
        return plan.peak_gib is not None

    def run(self, recomputed: int, offloaded: bool) -> Trial:
        """Forward, backward and an optimizer step on each batch, then on the last once more, for the time."""
        self.runners[0].recomputed, self.runners[0].offloaded = recomputed, offloaded
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        peak: float | None = None
        seconds = 0.0
        try:
            with torch.random.fork_rng([self.device]):
                for batch in [*self.batches, self.batches[-1]]:
                    started = time.perf_counter()
                    self._step(batch)
                    torch.cuda.synchronize(self.device)
                    seconds = time.perf_counter() - started
            peak = torch.cuda.max_memory_reserved(self.device) / 2**30
        except torch.OutOfMemoryError:
            for module in self.trainer.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
        except TorchDynamoException as error:
            if not self.runners[0].compiled:
                raise
            print(f"  the layers cannot be compiled here, so training is slower: {str(error).splitlines()[0]}")
            for runner in self.runners:
                runner.compiled = False
            return self.run(recomputed, offloaded)
        finally:
            self.trainer.optimizer.zero_grad(set_to_none=True)
        # What does not fit on one of several GPUs fits on none; the slowest sets the time.
        everyones = gather((peak, seconds))
        peaks = [peak for peak, _ in everyones if peak is not None]
        peak = max(peaks) if len(peaks) == len(everyones) else None
        trial = Trial(recomputed, offloaded, peak, max(seconds for _, seconds in everyones))
        print(trial, flush=True)
        return trial

    def _step(self, batch: Batch) -> None:
        model, optimizer = self.trainer.model, self.trainer.optimizer
        self.trainer.seeds.draw()
        self.trainer.compute_loss(model, batch.to(self.device)).backward()
        torch.nn.utils.clip_grad_norm_(self.trainer.trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def largest(sizes: Sequence[RecordSize], packs: Sequence[Sequence[int]], at_once: int) -> list[list[int]]:
    """The packs of the batches that need most memory: with most tokens, patches and labels; each batch once."""
    batches: list[list[int]] = []
    for what in ("tokens", "patches", "labels"):
        amount = [sum(getattr(sizes[number], what) for number in numbers) for numbers in packs]
        chosen = sorted(sorted(range(len(packs)), key=lambda index: -amount[index])[:at_once])
        if chosen not in batches:
            batches.append(chosen)
    return batches


def plan_training(
    trainer: FinetuneTrainer,
    dataset: RecordDataset,
    sizes: Sequence[RecordSize],
    speed: SpeedArguments,
    length: int | None = None,
) -> int | None:
    """Give the trainer its batches, and its layers the way to run that the GPU has room for.

    Args:
        sizes: of the dataset's records.
        length: of packed sequences, where a run that is continued has decided it.

    Returns:
        Tokens of a packed sequence; None without packing.

    Raises:
        UserError: if the largest record does not fit.
    """
    args, model = trainer.args, trainer.model
    on_gpu = args.device.type == "cuda"
    packing = speed.packing
    if packing is None:
        packing = speed.pack_length is not None or (on_gpu and args.per_device_train_batch_size == 1)
    runners = take_over_layers(model, compiled=on_gpu if speed.compile is None else speed.compile, packing=packing)
    text, *towers = runners
    text.recomputed = text.count if args.recompute else 0
    for tower in towers:
        # A tower that learns computes its layers twice: it has four times the tokens.
        tower.recomputed = tower.count if args.recompute or (on_gpu and args.recompute is None) else 0

    tokens = [size.tokens for size in sizes]
    lengths = _lengths(trainer, tokens, length or speed.pack_length) if packing else [None]
    for length in lengths:
        if length is not None and max(tokens) > length:
            raise UserError(f"--pack_length {length}: the longest record has {max(tokens):,} tokens")
        packs = [[number] for number in range(len(sizes))] if length is None else pack(tokens, length, args.seed)
        trainer.use_packs(dataset, packs, dataset.processor.encoder.control.pad, length)
        if length is not None:
            share = sum(tokens) / (length * len(packs))
            print(f"Packed into {len(packs)} sequences of {length:,} tokens, {share:.1%} full")
        if not on_gpu:
            return length
        print(f"Trying the largest sequences with {limit_gib(args.device):.1f} GiB of GPU memory")
        batches = [
            trainer.data_collator([trainer.train_dataset[index] for index in chosen])
            for chosen in largest(sizes, packs, args.per_device_train_batch_size)
        ]
        if Preflight(trainer, runners, batches).find_plan(None if args.recompute is None else text.recomputed):
            return length
    worst = max(range(len(sizes)), key=lambda number: sizes[number])
    record = dataset.records[worst]
    raise UserError(
        f"{record.path}:{record.line}: the GPU's memory does not hold a training step of this record "
        f"({sizes[worst].tokens:,} tokens, images: {len(record.image_paths)}); shorten it, or use a larger card"
    )


def _lengths(trainer: FinetuneTrainer, tokens: Sequence[int], length: int | None) -> list[int]:
    """Tokens of packed sequences that are worth a try: the best first, then what the longest record needs."""
    if length is not None:
        return [length]
    args = trainer.args
    on_gpu = args.device.type == "cuda"
    most = tokens_without_recomputation(trainer.model, args.device) if on_gpu else TOKENS_ON_CPU
    epochs = args.num_train_epochs if args.max_steps < 0 else math.inf
    at_once = args.gradient_accumulation_steps * world_size()
    shortest, chosen = round_up(max(tokens)), choose_length(tokens, most, epochs, at_once)
    return [chosen, shortest] if shortest < chosen else [chosen]


def take_over_layers(model: PeftModel, compiled: bool, packing: bool) -> list[LayerRunner]:
    """Have the layers of the text model and, if there is one, of the vision tower run by a `LayerRunner` each."""
    if compiled:
        set_up_compiler()
    base: Any = model.get_base_model()
    text = text_model(base)
    text.config._attn_implementation = PACKED
    # Packed sequences have one length. Pages come in many.
    runners = [LayerRunner(text.layers, compiled, dynamic=not packing)]
    if tower := getattr(base.model, "vision_tower", None):
        runners.append(LayerRunner(tower.transformer.layers, compiled, dynamic=True))
    return runners
