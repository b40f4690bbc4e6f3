"""Train a LoRA adapter for a Mistral model, vision or text only, on pages and questions about them, or plain text.

    python -m train --dataset dataset/train.jsonl --output_dir output --lora_rank 16 --learning_rate 1e-4

Writes a new folder output/<two-words-hex>/ with the adapter (plain peft loads it), the tokenizer and processor files,
run.json (the settings, the data's hash and the package versions), config.yaml (--config with it repeats the run),
metrics.jsonl, loss.svg and status.json, which python -m train_status reads. Every record is read and every page opened
before the weights are loaded; what is wrong is said by file and line. --resume_from_checkpoint <name> continues a run
of --output_dir, auto the newest one with the same settings. On Ctrl-C, SIGTERM or SIGUSR1 it saves after the step and
ends.

    torchrun --nproc_per_node 2 -m train …      (or accelerate launch --config_file configs/ddp.yaml -m train …)

trains on several GPUs, each with a copy of the base, or with --shard_base True with a share of it.
"""

import sys
from typing import TYPE_CHECKING

from mistral_ft.cli import run_step
from mistral_ft.distributed import finish, from_first, silence_others, world_size
from mistral_ft.errors import UserError
from mistral_ft.training.arguments import EPILOG, OURS, HelpFormatter, TrainParser

if TYPE_CHECKING:  # they import torch, which takes seconds and --help does without
    import torch

    from mistral_ft.data.processor import Processor
    from mistral_ft.training.examples import Examples
    from mistral_ft.training.run_folder import Run
    from mistral_ft.training.settings import Settings
    from mistral_ft.training.trainer import FinetuneTrainer


def main() -> None:
    # 1. Arguments.
    if {"-h", "--help"} & set(sys.argv[1:]):
        TrainParser(
            OURS, formatter_class=HelpFormatter, prog="python -m train", description=__doc__, epilog=EPILOG
        ).print_help()
        return
    silence_others()
    from mistral_ft.model.device import print_peak_memory
    from mistral_ft.status import Status
    from mistral_ft.training.examples import Examples, read_data
    from mistral_ft.training.new_adapter import find_start, load_with_adapter
    from mistral_ft.training.run_folder import Run
    from mistral_ft.training.settings import Settings
    from mistral_ft.training.trackers import tracking
    from mistral_ft.training.trainer import FinetuneTrainer

    settings = Settings.parse()

    # 2. Records: their shape takes a moment to check.
    records, held_out = read_data(settings)

    # 3. The other processes and the device; then the run to continue, if one is asked for.
    device = take_device(settings)
    resumed = Run.find(settings)
    if resumed and resumed.is_over:
        print(f"Nothing to do: this run is over\nAdapter saved in {resumed.folder}")
        finish()
        return
    start = None if resumed else find_start(settings)  # a checkpoint has the adapter as it is now

    # 4. Pages and tokens: every image is opened and every record encoded before the weights are loaded.
    processor = check_base(settings, device)
    examples = Examples.measure(records, held_out, processor, settings)

    # 5. The run's folder: a new one, or that of the run to continue.
    run = resumed or from_first(lambda: Run.create(settings, processor.folder, examples.rows))
    run.enter(settings.training)
    status = Status(run.folder)
    with run.cleaned_up_if_useless(), status.ended(), tracking(settings, run.folder, run.step) as trackers:
        status.update("preparing")
        print(f"Run folder {run.folder}" + (f", {world_size()} processes" if world_size() > 1 else ""))

        # 6. The base, frozen, and the adapter.
        model = load_with_adapter(settings, device, start)

        # 7. Training; before its first step, what the GPU has room for is tried out.
        lora = settings.lora
        rates = {"vision_tower": lora.vision_lr, "multi_modal_projector": lora.projector_lr}
        trainer = FinetuneTrainer(
            model,
            settings.training,
            status,
            trackers,
            learning_rates={part: rate for part, rate in rates.items() if rate is not None},
            b_rate_ratio=lora.loraplus_lr_ratio or 1,
            save_minutes=settings.checkpoints.save_minutes,
            evaluator=examples.evaluator,
            patience=settings.evaluation.early_stopping_patience,
        )
        train(trainer, examples, run, settings)

        # 8. The adapter, whole or not at all; a first signal is noted, and lets it be saved.
        with trainer.stop:
            trainer.choose_adapter()
            status.update("saving")
            from_first(lambda: run.save_adapter(model))
            trainer.save_state()
            trainer.clear_up()
    print_peak_memory(device)
    print(f"Adapter saved in {run.folder}")
    finish()


def take_device(settings: "Settings") -> "torch.device":
    """Join the other processes, and take this one's GPU or the CPU.

    Raises:
        UserError: if that, the optimizer or a tracker cannot be had.
    """
    from mistral_ft.model.device import pick_device, quiet_libraries
    from mistral_ft.model.rounding import check_rounding
    from mistral_ft.training.optimizer import check_optimizer
    from mistral_ft.training.trackers import check_trackers

    quiet_libraries()
    args = settings.training.begin()
    device = pick_device(settings.model.gpu_memory_gib, args.use_cpu)
    check_rounding(settings.model.rounding, device)
    check_optimizer(args)
    check_trackers(args)
    return device


def check_base(settings: "Settings", device: "torch.device") -> "Processor":
    """What the base is fed, once it is known that it will fit; its weights may not be there yet.

    Raises:
        UserError: if it is no base that can be trained so, or too large for the device.
    """
    from mistral_ft.data.processor import Processor
    from mistral_ft.folders import find_model_folder
    from mistral_ft.model.loading import check_model_folder
    from mistral_ft.model.rounding import FOUR_BITS, FP8, is_four_bit
    from mistral_ft.model.size import check_size

    model, sharded = settings.model, settings.speed.shard_base
    base = find_model_folder(model.model_id, weights=False)
    rounding = FOUR_BITS if is_four_bit(check_model_folder(base)) else model.rounding
    taken = "--shard_base True" if sharded else "--base_dtype fp8" if rounding == FP8 else None
    four_bits = "--load_in_4bit True" + (f" instead of {taken}" if taken else "")
    cpu_is_chosen = bool(settings.training.given.get("use_cpu"))
    check_size(model.model_id, base, device, rounding, world_size() if sharded else 1, four_bits, cpu_is_chosen)
    processor = Processor.from_folder(base)
    if processor.fitter is None and (settings.lora.vision_lora or settings.lora.train_projector):
        raise UserError(f"--vision_lora and --train_projector: {model.model_id} has no vision tower")
    return processor


def train(trainer: "FinetuneTrainer", examples: "Examples", run: "Run", settings: "Settings") -> None:
    """Decide which records share a sequence and which layers are computed twice, and train.

    Raises:
        KeyboardInterrupt: if a signal ended it; what was learned is saved.
        UserError: if memory or the compiler fails, or there was no step to train.
    """
    import torch
    from torch._dynamo.exc import TorchDynamoException

    from mistral_ft.training.preflight import plan_training

    try:
        length = plan_training(trainer, examples.dataset, examples.sizes, settings.speed, run.read_pack_length())
        run.write_pack_length(length)
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    except torch.OutOfMemoryError:
        raise UserError(
            "the GPU's memory is used up: does another program use it too? Lower --gpu_memory_gib to leave it some "
            "when you go on"
        ) from None
    except TorchDynamoException as error:
        raise UserError(f"--compile: the layers cannot be compiled here: {str(error).splitlines()[0]}") from None
    if trainer.stopped:
        step = trainer.state.global_step
        raise KeyboardInterrupt(f"stopped after step {step}, which is saved" if step else "stopped before a step")
    if not trainer.state.global_step:
        raise UserError("no step was trained: there are fewer records than a batch, with --dataloader_drop_last")


if __name__ == "__main__":
    run_step(main, unix_only=True)
