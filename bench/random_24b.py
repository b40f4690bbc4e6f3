"""Write a folder with the shapes and file layout of Mistral-Small-3.1-24B and random weights: 48 GB, on a GPU.

    python -m bench.random_24b /tmp/24b [--tekken tekken_240911.json] [--layers 40]

For measuring the real code at full size where the real weights cannot be had. What it answers means nothing.
"""

import argparse
import time
from pathlib import Path

from models.tiny.build import find_tekken, mistral3_config, write_tokenizer, write_weights


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tekken", type=Path, help="Tekken file of 130,072 ranks or more (default: mistral-common's)")
    parser.add_argument("--layers", type=int, default=40, help="text layers, for a smaller cut")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()

    started = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    write_tokenizer(args.output, args.tekken or find_tekken(), control_tokens=1000, vocab_size=131072)
    write_weights(args.output, config_24b(args.layers), seed=0, max_shard_size="5GB", device=args.device)
    size = sum(path.stat().st_size for path in args.output.glob("*.safetensors"))
    print(f"{size / 1e9:.1f} GB in {args.output} after {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
