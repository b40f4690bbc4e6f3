"""Write a folder with the shapes and file layout of Mistral-Small-3.1-24B and random weights: 48 GB, on a GPU.

    python -m bench.random_24b /tmp/24b [--tekken tekken_240911.json] [--layers 40]

For measuring the real code at full size where the real weights cannot be had. What it answers means nothing.
"""

import argparse
import time
from pathlib import Path

from bench import gpu
from models.tiny import build
from models.tiny.build import CONTROLS, find_tekken, mistral3_config, tiny_config, write_tokenizer, write_weights

TINY = Path(build.__file__).parent


def config_24b(layers: int = 40):
    """The sizes in config.json of mistralai/Mistral-Small-3.1-24B-Instruct-2503."""
    return mistral3_config(
        text=dict(
            hidden_size=5120, intermediate_size=32768, num_hidden_layers=layers, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, vocab_size=131072, max_position_embeddings=131072, rope_theta=1e9,
        ),
        vision=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                    head_dim=64),
    )  # fmt: skip


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """--layers or --tiny, and --device."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--layers", type=int, default=40, help="text layers, for a smaller cut")
    size.add_argument("--tiny", action="store_true", help="the sizes of models/tiny, to try this script on a CPU")
    parser.add_argument(
        "--device", default="cuda" if gpu.on_gpu() else "cpu", help="where weights are drawn (default: a GPU, if any)"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tekken", type=Path, help="Tekken file of 130,072 ranks or more (default: mistral-common's)")
    add_size_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    started = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    config = tiny_config() if args.tiny else config_24b(args.layers)
    tekken = args.tekken or (TINY / "tekken.json" if args.tiny else find_tekken())
    write_tokenizer(args.output, tekken, CONTROLS if args.tiny else 1000, config.text_config.vocab_size)
    write_weights(args.output, config, seed=0, max_shard_size="5GB", device=args.device)
    size = sum(path.stat().st_size for path in args.output.glob("*.safetensors"))
    print(f"{size / 1e9:.1f} GB in {args.output} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
