"""Answer every record of a file with a base model, a base and its adapter, or a merged model.

    python -m predict dataset/test.jsonl output/<name>

Writes ./<name>.jsonl: each record as it is, plus `actual`, in the order of the file; plain text gets `nll` instead, its
negative log-likelihood in nats over `tokens` tokens, from which score makes perplexity. What a model thinks before the
answer goes to `thinking`. Finished rows go to <name>.jsonl.partial at once; after a stop, the same command goes on from
there. A record whose page cannot be opened gets `error` instead of `actual`, the others go on, and the exit code is 1.
Records need no `expected`.

    torchrun --nproc_per_node 2 -m predict dataset/test.jsonl output/<name>

answers on several GPUs, each with a copy of the model, and writes the same file.
"""

import argparse
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mistral_ft.cli import ArgumentParser, run_step
from mistral_ft.data.pages import limit_pages
from mistral_ft.data.records import MAX_NEW_TOKENS, MAX_SEQ_LENGTH, read_records
from mistral_ft.data.row_images import keep_image_tag
from mistral_ft.distributed import (
    TIMEOUT_SECONDS,
    finish,
    from_first,
    gather,
    join,
    rank,
    silence_others,
    world_size,
)
from mistral_ft.errors import UserError
from mistral_ft.folders import locate
from mistral_ft.model.gpus import use_gpu
from mistral_ft.scoring.metrics import is_hit


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m predict", description=__doc__.split("\n\n")[0])
    parser.add_argument("dataset", help="JSONL file of records")
    parser.add_argument("model", help="run in output/, folder of an adapter or a merged model, or hub id")
    parser.add_argument("-o", "--output", metavar="FILE", help="predictions file (default: ./<name>.jsonl)")
    parser.add_argument("--images_dir", help="folder that image paths are relative to (default: the dataset's own)")
    parser.add_argument("--max_image_pixels", type=int, help="pixels an image may have (default: 178 million)")
    parser.add_argument("--pdf_seconds", type=float, help="seconds of work a page of a PDF may take (default: 20)")
    parser.add_argument("--keep_image_tag", action="store_true", help="take <image> for text in rows without an image")
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        default=MAX_NEW_TOKENS,
        help=f"tokens an answer may have (default: {MAX_NEW_TOKENS})",
    )
    parser.add_argument(
        "--max_seq_length",
        type=int,
        default=MAX_SEQ_LENGTH,
        help=f"tokens of the pieces that longer plain text is read in (default: {MAX_SEQ_LENGTH})",
    )
    parser.add_argument("--batch_size", default="auto", help="records answered at once (default: auto, by GPU memory)")
    parser.add_argument("--num_beams", type=int, default=1, help="search with so many beams (default: 1, greedy)")
    parser.add_argument("--temperature", type=float, help="sample answers at this temperature (default: greedy)")
    parser.add_argument("--top_p", type=float, help="sample from the likeliest tokens of this total probability")
    parser.add_argument("--top_k", type=int, help="sample from the so many likeliest tokens")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--limit", type=int, help="answer only the first LIMIT records (default: all)")
    parser.add_argument(
        "--load_in_4bit",
        action=argparse.BooleanOptionalAction,
        help="keep the text layers' weights in 4 bits (default: as the adapter was trained)",
    )
    parser.add_argument(
        "--base_dtype", choices=("bf16", "fp8"), help="or in FP8, or not (default: as the adapter was trained)"
    )
    parser.add_argument("--gpu_memory_gib", type=float, help="GPU memory to get by with (default: all)")
    parser.add_argument("--overwrite", action="store_true", help="start again instead of continuing a stopped run")
    args = parser.parse_args()
    if args.load_in_4bit and args.base_dtype:
        parser.error("--load_in_4bit and --base_dtype exclude each other")
    if args.batch_size != "auto":
        if not args.batch_size.isdecimal():
            parser.error(f"--batch_size {args.batch_size}: must be a number or auto")
        args.batch_size = int(args.batch_size)
    for name in ("max_new_tokens", "max_seq_length", "batch_size", "limit", "num_beams", "top_k"):
        if isinstance(getattr(args, name), int) and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    for name, highest in (("temperature", math.inf), ("top_p", 1)):
        if getattr(args, name) is not None and not 0 < getattr(args, name) <= highest:
            parser.error(f"--{name} {getattr(args, name):g}: out of range")
    return args


def search_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What of `generate` the user asked for; nothing for greedy decoding."""
    sampling = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k") if getattr(args, name)}
    settings = sampling | ({"do_sample": True} if sampling else {})
    return settings | ({"num_beams": args.num_beams} if args.num_beams > 1 else {})


def default_name(model: str) -> str:
    """The run's name, with the checkpoint's behind it for one of those; the last part of a path or hub id."""
    folder = Path(model).resolve()
    return f"{folder.parent.name}-{folder.name}" if folder.name.startswith("checkpoint-") else folder.name


def count_right(rows: Iterable[dict[str, Any]]) -> tuple[int, int]:
    """How many rows are right, of how many that say what is expected."""
    right = [is_hit(row) for row in rows if row.get("expected") is not None]
    return sum(right), len(right)


def main() -> int:
    # 1. Arguments and records.
    args = parse_arguments()
    args.model = locate(args.model)
    silence_others()
    limit_pages(args.max_image_pixels, args.pdf_seconds)
    keep_image_tag(args.keep_image_tag)
    records = read_records([args.dataset], args.images_dir)[: args.limit]

    from mistral_ft.data.predictions import Predictions
    from mistral_ft.data.rows import data_files
    from mistral_ft.data.workers import WorkerLost
    from mistral_ft.files import sha256_file
    from mistral_ft.model.device import pick_device, print_peak_memory, quiet_libraries
    from mistral_ft.model.rounding import check_rounding
    from mistral_ft.model.size import check_size
    from mistral_ft.prediction.batch_plan import page_lengths, plan
    from mistral_ft.prediction.generator import Generator
    from mistral_ft.prediction.trained_model import ModelFolders
    from mistral_ft.progress import Progress
    from mistral_ft.training.run_folder import versions

    quiet_libraries()
    on_gpu = use_gpu()
    join(TIMEOUT_SECONDS, on_gpu, "gloo")  # what the processes tell each other is text
    device = pick_device(args.gpu_memory_gib, use_cpu=not on_gpu)

    # 2. The model's folders and prompt settings; the weights come later.
    folders = ModelFolders.find(args.model, args.load_in_4bit, args.base_dtype)
    check_rounding(folders.rounding, device)
    taken = f"--base_dtype {args.base_dtype}" if args.base_dtype else None
    taken = "--no-load_in_4bit" if args.load_in_4bit is False else taken
    four_bits = "--load_in_4bit" + (f" instead of {taken}" if taken else "")
    check_size(folders.base, folders.folder, device, folders.rounding, smaller=four_bits)
    processor = folders.load_processor()

    # 3. The plan: batches of like length, and what an earlier run has done of them.
    search, lengths = search_settings(args), page_lengths(records, processor)
    size = None if args.batch_size == "auto" else args.batch_size
    beams = args.num_beams if search else None
    texts = {row for row, record in enumerate(records) if record.text is not None}
    batches = from_first(lambda: plan(lengths, folders, device, args.max_new_tokens, size, beams, texts))
    settings = {
        "dataset": [sha256_file(file) for file in data_files(args.dataset)],
        "images_dir": args.images_dir,
        "max_image_pixels": args.max_image_pixels,
        "pdf_seconds": args.pdf_seconds,
        "model": folders.fingerprint(),
        "max_seq_length": args.max_seq_length,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "search": search | {"seed": args.seed} if search else {},
        "limit": args.limit,
        "device": device.type,
        "versions": versions(),
    }
    output = Path(args.output or f"{default_name(args.model)}.jsonl")
    if output.resolve() == Path(args.dataset).resolve():
        raise UserError(f"{output}: is the dataset itself; give another file with -o")
    predictions = Predictions(output, settings, batches, args.overwrite)  # of several processes the first one writes
    left = from_first(lambda: predictions.batches_left)
    if predictions.done and rank() == 0:
        print(f"Continuing: {len(predictions.done)} of {len(records)} rows are done", file=sys.stderr)

    # 4. Answers, batch by batch.
    rows = [record.row for record in records]
    hits, scored = count_right(predictions.done.values())
    progress = Progress("predicting", len(rows), "row", done=len(predictions.done))
    mine = left[rank() :: world_size()]
    try:
        if left:
            generator = Generator(
                folders, processor, device, args.max_new_tokens, search, args.seed, args.max_seq_length
            )
            found = generator.answer(records, mine)
            # In turns, so that rows reach the disk in the order of the plan, whoever answered them.
            for turn in range(math.ceil(len(left) / world_size())):
                for answers in filter(None, gather(next(found) if turn < len(mine) else None)):
                    if rank() == 0:
                        finished = {index: answer.write_into(rows[index]) for index, answer in answers.items()}
                        predictions.add(finished)
                        more_hits, more_scored = count_right(finished.values())
                        hits, scored = hits + more_hits, scored + more_scored
                    text = f"accuracy {hits}/{scored} = {hits / scored:.3f}" if scored else ""
                    progress.update(len(answers), text)
    except (KeyboardInterrupt, WorkerLost) as stop:
        progress.close()
        done = f"{progress.done} of {len(rows)} rows are done; the same command continues"
        raise type(stop)(f"{stop} {done}" if isinstance(stop, WorkerLost) else f"stopped: {done}") from None
    progress.close()

    # 5. The file, whole.
    from_first(predictions.finish)
    failed = from_first(lambda: {i: row["error"] for i, row in sorted(predictions.done.items()) if "error" in row})
    for i, reason in failed.items() if rank() == 0 else ():
        print(f"error: {records[i].error(reason)}", file=sys.stderr)
    print(f"{len(rows)} rows in {output}, {len(failed)} with an error")
    # Of several processes the first has the rows, and a stdout.
    unsaid = [row for row in predictions.done.values() if "thinking" in row and not row["actual"]]
    if unsaid:
        cut = sum(row["finish_reason"] == "length" for row in unsaid)
        print(f"{len(unsaid)} hold thinking without an answer, {cut} of them cut off by --max_new_tokens")
    print_peak_memory(device)
    finish()
    return 1 if failed else 0


if __name__ == "__main__":
    run_step(main)
