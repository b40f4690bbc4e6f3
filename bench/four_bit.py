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
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import MistralConfig, MistralForCausalLM

from bench.random_24b import config_24b
from dataset.make_dataset import BODY
from mistral_ft.prompt import PromptEncoder
from models.tiny.build import save_weights, write_weights

ROOT = Path(__file__).parents[1]
TINY = ROOT / "models/tiny"
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
        config = config_24b(layers=2 if tiny else 40)
        if tiny:
            config.text_config.hidden_size, config.text_config.intermediate_size = 256, 512
            config.text_config.vocab_size, config.vision_config.num_hidden_layers = 4096, 2
        write_weights(folder, config, seed=0, max_shard_size="5GB", device=device)
        return
    config = config_7b()
    if tiny:
        config.hidden_size, config.intermediate_size, config.num_hidden_layers = 256, 512, 2
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

    def __init__(self, work: Path, seconds: float, on_gpu: bool):
        self.work, self.on_gpu = work, on_gpu
        self.started, self.end = time.monotonic(), time.monotonic() + seconds
        self.results: list[str] = []

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:5.0f} s] {text}", flush=True)

    def command(self, module: str, *arguments) -> list[str] | None:
        """The lines a command printed; None if it failed or the time is over."""
        left = self.end - time.monotonic()
        if left < 20:
            self.say(f"no time left for {module}")
            return None
        command = ["timeout", f"{left:.0f}", sys.executable, "-m", module, *map(str, arguments)]
        self.say(" ".join(command[4:]))
        process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            self.say(f"  {lines[-1]}")
        return None if process.wait() else lines

    def train(self, name: str, base: Path, data: Path, gib: float, *more) -> Path | None:
        """Train for 24 steps and note memory and speed; the run's folder."""
        limit = ["--gpu_memory_gib", gib] if self.on_gpu else []
        lines = self.command(
            "train", "--model_id", base, "--dataset", data, "--output_dir", self.work / "output",
            "--load_in_4bit", "True", "--max_steps", 24, "--logging_steps", 8, "--learning_rate", "1e-4",
            "--save_strategy", "no", *limit, *more,
        )  # fmt: skip
        if lines is None:
            self.results.append(f"{name:44} failed")
            return None
        run = Path(lines[-1].removeprefix("Adapter saved in "))
        logs = json.loads((run / "trainer_state.json").read_text())["log_history"]
        rates = [entry["tokens_per_second"] for entry in logs if "tokens_per_second" in entry][
            1:
        ]  # not what is slow once
        peak = next((line.split()[3] for line in lines if line.startswith("Peak GPU memory")), "-")
        packed = next((line for line in lines if line.startswith("Packed")), "no packing")
        speed = len(rates) / sum(1 / rate for rate in rates)
        self.results.append(f"{name:44} {peak:>6} GiB of {gib:g}, {speed:7,.0f} tokens/s, {packed}")
        self.say(self.results[-1])
        return run

    def predict(self, name: str, run: Path, data: Path, gib: float) -> None:
        """Answer or read eight records and note the memory and the time, loading included."""
        limit = ["--gpu_memory_gib", gib] if self.on_gpu else []
        started = time.monotonic()
        output = self.work / f"{data.stem}-{run.name}.jsonl"
        lines = self.command("predict", data, run, "-o", output, "--limit", 8, "--max_new_tokens", 20, *limit)
        peak = next((line.split()[3] for line in lines or [] if line.startswith("Peak GPU memory")), "-")
        how = "failed" if lines is None else f"{peak:>6} GiB of {gib:g}, {time.monotonic() - started:.0f} s in all"
        self.results.append(f"{name:44} {how}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--stages", nargs="+", choices=("7b", "24b"), default=["7b", "24b"])
    parser.add_argument("--seconds", type=float, default=560, help="end what runs after so long (default: 560)")
    parser.add_argument("--tiny", action="store_true", help="small models, to try this script")
    args = parser.parse_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench(args.work, args.seconds, device == "cuda")

    # 1. Data.
    args.work.mkdir(parents=True, exist_ok=True)
    texts, pages = args.work / "texts.jsonl", args.work / "pages" / "pages.jsonl"
    tokens = 64 if args.tiny else TEXT_TOKENS
    write_texts(texts, 64, tokens)
    questions = args.work / "questions.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"What is in article {k}?"}]} for k in range(8)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if "24b" in args.stages:
        bench.command("bench.make_pages", pages.parent, "--count", 8 if args.tiny else 48)

    # 2. Each base: as the defaults have it, then with a change; and answers of the first adapter.
    paged = ("--optim", "paged_adamw_8bit")
    for stage in args.stages:
        base = args.work / stage
        write_base(base, stage, args.tiny, device)
        bench.say(f"{base} written")
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

    print(f"\n{torch.cuda.get_device_name() if bench.on_gpu else 'CPU'}")
    print("\n".join(bench.results))


if __name__ == "__main__":
    main()
