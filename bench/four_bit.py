"""Training on 4-bit bases at full size, through train: peak memory and tokens per second on small cards' worth of GPU.

    python -m bench.four_bit /tmp/four [--stages 7b 24b]

Random weights in the shapes of Mistral-7B-v0.3 (14.5 GB on the disk) and of Mistral-Small-3.1-24B (48 GB), one after
the other; the tokenizer is that of models/tiny, whose ids both have. The 7B learns plain text in records of 2,048
tokens, all of them labels, within 12 GiB; the 24B within 24 GiB learns answers about pages of about 2,000 tokens, and
plain text; then both answer and read. Needs 50 GB of disk and bitsandbytes; 9 minutes on one H200. --tiny shrinks the
models, to try the script, on a CPU too.
"""

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path

import torch
from transformers import MistralConfig, MistralForCausalLM

from bench import gpu, steps
from bench.make_pages import make_pages
from bench.random_24b import config_24b
from dataset.make_dataset import BODY
from mistral_ft.data.prompt.encoder import PromptEncoder
from models.tiny.build import save_weights, tiny_config, write_weights

TINY = steps.ROOT / "models/tiny"
PROMPT_FILES = ("tekken.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")

TEXT_TOKENS = 2048


def config_7b() -> MistralConfig:
    """The sizes in config.json of mistralai/Mistral-7B-Instruct-v0.3."""
    return MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32768, max_position_embeddings=32768, rms_norm_eps=1e-5, rope_theta=1e6, sliding_window=None,
        tie_word_embeddings=False,
    )  # fmt: skip


def write_base(folder: Path, stage: str, tiny: bool, device: str) -> None:
    """Write a base with random weights and the tokenizer of models/tiny."""
    folder.mkdir(parents=True)
    for name in PROMPT_FILES:
        shutil.copyfile(TINY / name, folder / name)
    if stage == "24b":
        write_weights(folder, tiny_config() if tiny else config_24b(), seed=0, max_shard_size="5GB", device=device)
        return
    config = config_7b()
    if tiny:
        config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size = 256, 512, 2, 4096
    torch.manual_seed(0)
    with torch.device(device):
        model = MistralForCausalLM._from_config(config, dtype=torch.bfloat16)
    save_weights(model, folder, "5GB")


def write_texts(path: Path, count: int, tokens: int) -> None:
    """Plain text of so many tokens a row, or a few less."""
    encoder, rng = PromptEncoder.from_folder(TINY), random.Random(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            words = rng.choices(BODY, k=tokens)
            while (longer := len(encoder.encode_text(" ".join(words))[0]) - tokens) > 0:
                del words[-max(1, longer // 3) :]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")


class Bench:
    """Runs the commands as a user would, and reads what they say."""

    def __init__(self, work: Path, seconds: float, steps_trained: int):
        self.work, self.end, self.steps = work, time.monotonic() + seconds, steps_trained
        self.results: list[str] = []
        self.failed: list[str] = []

    def command(self, name: str, module: str, *arguments, gib: float) -> list[str] | None:
        """The lines a command printed; None if it failed or the time is over."""
        limit = ["--gpu_memory_gib", gib] if gpu.on_gpu() else []
        left = self.end - time.monotonic()
        if left > 20:
            print(f"\n{name}: {module} {' '.join(map(str, arguments))}", flush=True)
            environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
            done = steps.run(module, *arguments, *limit, seconds=left, environment=environment)
            if not done.code:
                return done.lines
        self.failed.append(name)
        self.results.append(f"{name:44} {'failed' if left > 20 else 'no time left'}")
        return None

    def train(self, name: str, base: Path, data: Path, gib: float, *more) -> Path | None:
        """Train and note memory and speed; the run's folder."""
        lines = self.command(
            name, "train", "--model_id", base, "--dataset", data, "--output_dir", self.work / "output",
            "--load_in_4bit", "True", "--max_steps", self.steps, "--logging_steps", self.steps // 3,
            "--learning_rate", "1e-4", "--save_strategy", "no", *more, gib=gib,
        )  # fmt: skip
        if lines is None:
            return None
        run = steps.run_folder(lines)
        packing = gpu.on_gpu() or "--pack_length" in more
        packed = steps.said(lines, "(Packed into .+)") if packing else "no packing"
        speed, peak = steps.tokens_per_second(run), steps.peak_memory(lines)
        self.results.append(f"{name:44} {peak:>10} of {gib:g}, {speed:7,.0f} tokens/s, {packed}")
        print(self.results[-1], flush=True)
        return run

    def predict(self, name: str, run: Path, data: Path, gib: float) -> None:
        """Answer or read eight records and note the memory and the time, loading included."""
        started = time.monotonic()
        output = self.work / f"{data.stem}-{run.name}.jsonl"
        lines = self.command(name, "predict", data, run, "-o", output, "--limit", 8, "--max_new_tokens", 20, gib=gib)
        if lines is not None:
            seconds, peak = time.monotonic() - started, steps.peak_memory(lines)
            self.results.append(f"{name:44} {peak:>10} of {gib:g}, {seconds:.0f} s in all")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--stages", nargs="+", choices=("7b", "24b"), default=["7b", "24b"])
    parser.add_argument("--seconds", type=float, default=560, help="end what runs after so long (default: 560)")
    parser.add_argument("--tiny", action="store_true", help="small models and few steps, to try this script")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = "cuda" if gpu.on_gpu() else "cpu"
    bench = Bench(args.work, args.seconds, steps_trained=3 if args.tiny else 24)

    # 1. Data.
    args.work.mkdir(parents=True, exist_ok=True)
    texts, pages = args.work / "texts.jsonl", args.work / "pages" / "pages.jsonl"
    tokens = 64 if args.tiny else TEXT_TOKENS
    write_texts(texts, 64, tokens)
    questions = args.work / "questions.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"What is in article {k}?"}]} for k in range(8)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if "24b" in args.stages:
        make_pages(pages.parent, count=8 if args.tiny else 48, scale=0.1 if args.tiny else 1)

    # 2. Each base: as the defaults have it, then with a change; and answers of the first adapter.
    paged = ("--optim", "paged_adamw_8bit")
    for stage in args.stages:
        base = args.work / stage
        write_base(base, stage, args.tiny, device)
        print(f"{base} written", flush=True)
        if stage == "7b":
            run = bench.train("7B, text", base, texts, 12, "--pack_length", tokens)
            bench.train("7B, text, --compile False", base, texts, 12, "--pack_length", tokens, "--compile", "False")
            bench.train("7B, text, paged 8-bit AdamW", base, texts, 12, "--pack_length", tokens, *paged)
            asked, gib = questions, 12
        else:
            run = bench.train("24B, pages", base, pages, 24)
            bench.train("24B, pages, paged 8-bit AdamW", base, pages, 24, *paged)
            bench.train("24B, text, paged 8-bit AdamW", base, texts, 24, *paged)
            asked, gib = pages, 24
        if run:
            bench.predict(f"{stage}: eight answers of 20 tokens", run, asked, gib)
            bench.predict(f"{stage}: eight texts read", run, texts, gib)
        shutil.rmtree(base)

    print(f"\n{gpu.device_name()}")
    print("\n".join(bench.results))
    if bench.failed:
        sys.exit(f"not measured: {', '.join(bench.failed)}")


if __name__ == "__main__":
    main()
