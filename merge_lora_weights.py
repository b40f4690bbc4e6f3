"""Merge an adapter into its base: a standalone model folder for production.

    python -m merge_lora_weights <name> <output-dir>

<name> is a run in output/, or a path. The folder loads with AutoModelForImageTextToText and needs no peft. Weights keep
the base's key names, file split and dtype; an adapter's change is added in fp32 and rounded once. Every tensor of the
adapter is used exactly once, or nothing is written. No GPU and no second copy of the model in memory are needed.
"""

from pathlib import Path

from mistral_ft.errors import ArgumentParser, UserError, run_step


def main() -> None:
    # 1. Arguments.
    parser = ArgumentParser(prog="python -m merge_lora_weights", description=__doc__.split("\n\n")[0])
    parser.add_argument("name", help="adapter: a run in output/, or the path of its folder")
    parser.add_argument("output_dir", type=Path, help="folder to make; it must not exist or be empty")
    args = parser.parse_args()
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        raise UserError(f"{args.output_dir}: exists and is not an empty folder; give a new one")
    folders = [folder for folder in (Path(args.name), Path("output") / args.name) if folder.is_dir()]
    if not folders:
        raise UserError(f"{args.name}: no such adapter folder, and none in output/")

    from mistral_ft.files import atomic_folder
    from mistral_ft.lora import Adapter
    from mistral_ft.merging import check_merged, copy_other_files, match_updates, merge_shard, read_weight_map
    from mistral_ft.model import check_model_folder
    from mistral_ft.progress import Progress

    # 2. The adapter, the base, and which tensor of the base each of its updates belongs to.
    adapter = Adapter(next((folder for folder in folders if Adapter.is_one(folder)), folders[0]))
    base = adapter.find_base()
    check_model_folder(base)
    weight_map = read_weight_map(base)
    updates = match_updates(adapter, base, weight_map)

    # 3. Shard by shard into a temporary folder, which gets its name when it is whole.
    with atomic_folder(args.output_dir.resolve()) as folder:  # a link to an empty folder stays one
        shards = sorted(set(weight_map.values()))
        progress = Progress("merging", len(shards), "shard")
        for shard in shards:
            merge_shard(base / shard, folder / shard, updates)
            progress.update()
        progress.close()
        copy_other_files(base, folder)
        check_merged(folder, weight_map, adapter)
    print(f"Merged {len(updates)} of {len(weight_map)} tensors of {adapter.base_model} into {args.output_dir}")


if __name__ == "__main__":
    run_step(main)
