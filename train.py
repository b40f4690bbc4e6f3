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
from pathlib import Path

from mistral_ft.cli import run_step
from mistral_ft.data.pages import limit_pixels
from mistral_ft.data.records import read_records
from mistral_ft.distributed import finish, from_first, rank, silence_others, take_sharding, world_size
from mistral_ft.errors import UserError
from mistral_ft.model.rounding import FOUR_BITS, FP8
from mistral_ft.training.arguments import (
    EPILOG,
    CheckpointArguments,
    DataArguments,
    EvaluationArguments,
    HelpFormatter,
    LoraArguments,
    ModelArguments,
    SpeedArguments,
    TrainParser,
)


def main() -> None:
    # 1. Arguments. --help is answered before torch is imported, which takes seconds.
    ours = (
        DataArguments, ModelArguments, LoraArguments, EvaluationArguments, SpeedArguments, CheckpointArguments
    )  # fmt: skip
    if {"-h", "--help"} & set(sys.argv[1:]):
        help_parser = TrainParser(
            ours, formatter_class=HelpFormatter, prog="python -m train", description=__doc__, epilog=EPILOG
        )
        help_parser.print_help()
        return
    silence_others()
    sharding = take_sharding()
    from mistral_ft.training.training_arguments import FinetuneArguments

    data_args, model_args, lora_args, eval_args, speed_args, checkpoint_args, args = TrainParser(
        (*ours, FinetuneArguments), prog="python -m train"
    ).parse()
    speed_args.shard_base |= sharding
    problems = model_args.problems() + lora_args.problems() + speed_args.problems() + checkpoint_args.problems()
    if problems := problems + eval_args.problems(args, speed_args.shard_base):
        raise UserError("; ".join(problems))
    if eval_args.wanted and args.eval_strategy == "no":
        args.eval_strategy = "epoch"
    args.keep_best |= eval_args.early_stopping_patience is not None
    if speed_args.shard_base and lora_args.use_dora:
        raise UserError("--use_dora True needs whole layers, and --shard_base True has none; leave one of them out")
    if speed_args.shard_base and model_args.rounding:
        raise UserError(f"weights rounded to {model_args.rounding} are not sharded; leave out --shard_base")
    if lora_args.use_dora and model_args.rounding == FP8:
        raise UserError("--use_dora True needs the weights themselves, not --base_dtype fp8; leave one of them out")

    limit_pixels(data_args.max_image_pixels)

    # 2. Records: their shape takes a moment to check.
    records = read_records(data_args.dataset, data_args.images_dir, expected_required=True)
    held_out = read_records(eval_args.eval_dataset or (), data_args.images_dir, expected_required=True)
    sees = lora_args.vision_lora or lora_args.train_projector
    if sees and lora_args.init_adapter is None and not any(record.image_paths for record in records):
        raise UserError("--vision_lora and --train_projector have no effect: no record has an image")

    import torch
    from torch._dynamo.exc import TorchDynamoException
    from transformers import set_seed

    from mistral_ft.data.dataset import RecordDataset, cut_texts, measure_records
    from mistral_ft.data.processor import Processor
    from mistral_ft.folders import find_model_folder, locate
    from mistral_ft.model.device import pick_device, print_peak_memory, quiet_libraries
    from mistral_ft.model.loading import check_model_folder, held_bytes, load_base
    from mistral_ft.model.rounding import check_rounding, is_four_bit
    from mistral_ft.model.size import check_size
    from mistral_ft.status import Status
    from mistral_ft.training.checkpoints import step_of
    from mistral_ft.training.evaluation import Evaluator, divide, hold_out
    from mistral_ft.training.new_adapter import add_adapter, find_start
    from mistral_ft.training.preflight import plan_training
    from mistral_ft.training.run_folder import Run
    from mistral_ft.training.trackers import check_trackers, tracking
    from mistral_ft.training.trainer import FinetuneTrainer
    from mistral_ft.training.training_arguments import check_optimizer

    quiet_libraries()
    device = pick_device(model_args.gpu_memory_gib, args.use_cpu)
    check_rounding(model_args.rounding, device)

    check_optimizer(args)
    check_trackers(args)
    settings = {"data": data_args, "model": model_args, "lora": lora_args, "speed": speed_args, "training": args}
    settings |= {"evaluation": eval_args, "checkpoints": checkpoint_args}
    resumed = None
    if args.resume_from_checkpoint == "auto":
        resumed = from_first(lambda: Run.resume_newest(args.output_dir, settings))
        if resumed and resumed.checkpoint is None:
            print(f"Nothing to do: this run is over\nAdapter saved in {resumed.folder}")
            finish()
            return
        print(f"Continuing from {resumed.checkpoint}" if resumed else "Nothing to continue from: a new run")
    elif args.resume_from_checkpoint is not None:
        named = locate(args.resume_from_checkpoint, args.output_dir)
        resumed = from_first(lambda: Run.resume(named, settings))
    start = None if resumed else find_start(lora_args, model_args.model_id)  # a checkpoint has the adapter as it is now
    from_first(lambda: Path(args.output_dir).mkdir(parents=True, exist_ok=True))

    # 3. Pages and tokens: every image is opened and every record encoded before the weights are loaded.
    base = find_model_folder(model_args.model_id, weights=False)
    rounding = FOUR_BITS if is_four_bit(check_model_folder(base)) else model_args.rounding
    taken = "--shard_base True" if speed_args.shard_base else "--base_dtype fp8" if rounding == FP8 else None
    four_bits = "--load_in_4bit True" + (f" instead of {taken}" if taken else "")
    processes = world_size() if speed_args.shard_base else 1
    check_size(model_args.model_id, base, device, rounding, processes, four_bits, bool(args.given.get("use_cpu")))
    processor = Processor.from_folder(base)
    if processor.fitter is None and (lora_args.vision_lora or lora_args.train_projector):
        raise UserError(f"--vision_lora and --train_projector: {model_args.model_id} has no vision tower")
    records, held_out = (cut_texts(some, processor.encoder, data_args.max_seq_length) for some in (records, held_out))
    held = [False] * len(records) + [True] * len(held_out)
    records = [*records, *held_out]
    sizes = measure_records(records, processor, data_args.max_seq_length)
    if eval_args.eval_fraction is not None:
        held = hold_out(records, eval_args.eval_fraction, args.seed)
    (records, sizes), (held_out, held_sizes) = divide(records, sizes, held)
    rows = len({(record.path, record.line) for record in records})
    lengths = [size.tokens for size in sizes]
    print(f"{len(records)} records, {sum(lengths):,} tokens, the longest {max(lengths):,}")
    evaluator = None
    if held_out:
        held_out, answered = RecordDataset(held_out, processor), eval_args.answered(speed_args.shard_base)
        evaluator = Evaluator(held_out, held_sizes, answered)
        print(f"{len(held_out)} records to evaluate on, {len(evaluator.answered)} of them answered")

    # 4. The run's folder: a new one, or that of the run to continue.
    run = resumed or from_first(lambda: Run.create(args.output_dir, settings, base, rows))
    if not run.folder.is_dir():
        raise UserError(f"{run.folder}: not to be seen by process {rank()}; --output_dir must be on a shared disk")
    args.output_dir, args.run_name = str(run.folder), args.run_name or run.folder.name

    status = Status(run.folder)
    step = step_of(run.checkpoint) if run.checkpoint else 0
    with run.cleaned_up_if_useless(), status.ended(), tracking(args, settings, run.folder, step) as trackers:
        status.update("preparing")
        print(f"Run folder {run.folder}" + (f", {world_size()} processes" if world_size() > 1 else ""))

        # 5. The base, frozen, and the adapter.
        set_seed(args.seed)
        model = load_base(find_model_folder(model_args.model_id), device, speed_args.shard_base, model_args.rounding)
        model = add_adapter(model, lora_args, model_args.model_id, start)
        print("{:,} of {:,} parameters learn".format(*model.get_nb_trainable_parameters()))
        if speed_args.shard_base:
            held, whole = (amount / 2**30 for amount in held_bytes(model))
            print(f"Each process holds {held:.4g} GiB of the {whole:.4g} GiB that the model has")

        # 6. How to train: which records share a sequence, and what the GPU has room for.
        rates = {"vision_tower": lora_args.vision_lr, "multi_modal_projector": lora_args.projector_lr}
        trainer = FinetuneTrainer(
            model=model,
            args=args,
            status=status,
            trackers=trackers,
            learning_rates={part: rate for part, rate in rates.items() if rate is not None},
            b_rate_ratio=lora_args.loraplus_lr_ratio or 1,
            save_minutes=checkpoint_args.save_minutes,
            evaluator=evaluator,
            patience=eval_args.early_stopping_patience,
        )
        try:
            dataset = RecordDataset(records, processor)
            run.pack_length = plan_training(trainer, dataset, sizes, speed_args, run.pack_length)

            # 7. Training.
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


if __name__ == "__main__":
    run_step(main, unix_only=True)
