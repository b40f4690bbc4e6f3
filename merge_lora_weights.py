"""Merge an adapter into its base: a standalone model folder for production.

    python -m merge_lora_weights <name> <output-dir>

<name> is a run in output/, or a path. The folder loads with AutoModelForImageTextToText, or AutoModelForCausalLM
where the model reads text only, and needs no peft. Weights keep the base's key names, file split and dtype; an
adapter's change is added in fp32 and rounded once. Every tensor is read again and proven bit by bit before the folder
gets its name. No GPU is needed, and memory for one tensor's rows only.
"""

import argparse
from pathlib import Path

from mistral_ft.cli import ArgumentParser, run_step
from mistral_ft.errors import UserError
from mistral_ft.files import check_new_folder
from mistral_ft.folders import locate


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(prog="python -m merge_lora_weights", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", help="adapter: a run in output/, or the path of its folder")
    parser.add_argument("output_dir", type=Path, help="folder to make; it must not exist or be empty")
    parser.add_argument(
        "--base_model", metavar="MODEL", help="hub id or folder to merge onto (default: the base the adapter names)"
    )
    parser.add_argument("--predictions", metavar="FILE", help="predictions file whose scores go into the model card")
    parser.add_argument(
        "--compare_on",
        metavar="FILE",
        help="records to answer (plain text: to read) with the adapter unmerged, and merged",
    )
    parser.add_argument("--limit", type=int, help="compare on the first LIMIT records (default: 16)")
    parser.add_argument("--images_dir", help="folder that image paths are relative to (default: the records' own)")
    parser.add_argument("--push_to_hub", metavar="REPO", help="upload the folder to this hub id")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    args = parser.parse_args()
    if args.private and not args.push_to_hub:
        parser.error("--private has no effect without --push_to_hub")
    if (args.limit or args.images_dir) and not args.compare_on:
        parser.error("--limit and --images_dir have no effect without --compare_on")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: must be at least 1")
    return args


def main() -> None:
    # 1. Arguments, and whatever can be refused before the long part.
    args = parse_arguments()
    check_new_folder(args.output_dir)
    folder = Path(locate(args.name))
    if not folder.is_dir():
        raise UserError(f"{args.name}: no such adapter folder, and none in output/")
    if args.push_to_hub:
        from mistral_ft.merging.upload import check_upload, upload

        check_upload(args.push_to_hub, args.private)

    from mistral_ft.data.records import read_records
    from mistral_ft.files import atomic_folder, check_free_space
    from mistral_ft.merging.merge import (
        base_note,
        check_folder,
        copy_other_files,
        find_base,
        match_updates,
        merge_weights,
    )
    from mistral_ft.merging.shards import read_checkpoint
    from mistral_ft.model.adapter import Adapter
    from mistral_ft.model.card import write_model_card
    from mistral_ft.model.device import pick_device, quiet_libraries
    from mistral_ft.model.size import check_size
    from mistral_ft.scoring.summary import card_scores

    quiet_libraries()
    scores = card_scores(args.predictions) if args.predictions else None
    records = read_records([args.compare_on], args.images_dir)[: args.limit or 16] if args.compare_on else []
    device = pick_device() if records else None  # None: nothing is compared

    # 2. The adapter, the base, and which tensor of the base each of its updates belongs to.
    adapter = Adapter(folder)
    base = find_base(adapter, args.base_model)
    base_model = args.base_model or adapter.base_model
    if note := base_note(adapter, base_model):
        print(note)
    shards = read_checkpoint(base)
    updates = match_updates(adapter, base, shards)
    if device is not None:
        from mistral_ft.merging.comparison import MergeComparer

        check_size(base_model, base, device)
        comparer = MergeComparer(records, base, adapter)

    # 3. Tensor by tensor into a temporary folder, which gets its name when all in it is proven.
    with atomic_folder(args.output_dir) as folder:
        check_free_space(folder, sum(shard.size for shard in shards))
        differing = merge_weights(shards, folder, updates)
        copy_other_files(base, folder)
        check_folder(folder, base, adapter)
        name = args.output_dir.resolve().name
        write_model_card(folder, name, "transformers", base_model, adapter.config, adapter.run, scores)
    count = sum(len(shard.tensors) for shard in shards)
    print(f"Merged {len(updates)} of {count} tensors of {base_model} into {args.output_dir}")
    print(
        f"Proven by reading it again: each of the adapter's {adapter.tensor_count} tensors is used once; "
        f"{len(updates)} tensors equal base + adapter in every bit ({differing} differ from the base), the other "
        f"{count - len(updates)} equal the base; config, index, tokenizer and page settings load"
    )

    # 4. The same answers as with the adapter unmerged?
    if device is not None:
        comparison = comparer.run(args.output_dir, device)
        comparison.print(args.compare_on)

    # 5. The hub.
    if args.push_to_hub:
        print(f"Uploaded to {upload(args.output_dir, args.push_to_hub, args.private)}")


if __name__ == "__main__":
    run_step(main, unix_only=True)
