"""Training speed at full size: this toolkit's train, the usual recipe and the GPU's matmul peak, one after the other.

    python -m bench.random_24b /tmp/24b --tekken tekken_240911.json
    python -m bench.make_pages /tmp/pages --count 64
    python -m bench.train_speed --gpu_memory_gib 78.5 /tmp/24b /tmp/pages/pages.jsonl [-- --base_dtype fp8]

The usual recipe is what scripts with peft do today: dropout 0.05, fp32 adapters under autocast, every layer
checkpointed, all logits, one page a step, transformers' own forward. Tokens are those of records: padding does not
count. The limit is 4N FLOP per token of a frozen text model of N parameters: 2N forward, 2N for the inputs' gradients.
With --check it also compares the first loss and the adapter's gradients of both, without dropout.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers.models.mistral3.modeling_mistral3 import Mistral3Model

from bench import gpu, steps
from mistral_ft.data.dataset import RecordDataset
from mistral_ft.data.pages import open_image
from mistral_ft.data.processor import Processor
from mistral_ft.data.records import read_records
from mistral_ft.model.device import pick_device
from mistral_ft.model.loading import load_base
from mistral_ft.training.arguments import LoraArguments
from mistral_ft.training.new_adapter import add_adapter
from mistral_ft.training.preflight import take_over_layers
from mistral_ft.training.trainer import FinetuneTrainer
from mistral_ft.training.training_arguments import FinetuneArguments


class UsualRecipe:
    """transformers' own forward on one record at a time."""

    def __init__(self, folder: Path, data: Path, device: torch.device, dropout: float):
        self.device = device
        self.processor = Processor.from_folder(folder)
        self.dataset = RecordDataset(read_records([data]), self.processor)
        model = load_base(folder, device)
        self.our_class, self.our_attention = model.model.__class__, model.config.vision_config._attn_implementation
        self.dtype = model.dtype
        self.use_transformers(model)
        torch.manual_seed(0)
        self.model = add_adapter(model, LoraArguments(lora_dropout=dropout), str(folder)).train()
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:  # zero at first, which makes half of the gradients zero
                torch.nn.init.normal_(parameter, std=0.01)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def use_transformers(self, model) -> None:
        model.model.__class__ = Mistral3Model
        model.config.vision_config._attn_implementation = "sdpa"

    def inputs(self, number: int) -> dict[str, torch.Tensor]:
        example = self.dataset[number]
        paths = self.dataset.records[number].image_paths
        fitter = self.processor.fitter
        pages = [torch.from_numpy(fitter.pixels(open_image(path, fitter))) for path in paths]
        batch = {
            "input_ids": torch.tensor([example.input_ids]),
            "attention_mask": torch.ones(1, len(example.input_ids), dtype=torch.int64),
            "labels": torch.tensor([example.labels]),
            "pixel_values": torch.stack(pages).to(self.dtype),
            "image_sizes": torch.tensor(example.image_sizes),
        }
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def loss(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.model(**inputs, use_cache=False).loss

    def measure(self, steps: int) -> tuple[float, float]:
        """(tokens per second, pages per second); reading pages is not counted, this once."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)
        batches = [self.inputs(number % len(self.dataset)) for number in range(steps + 2)]
        for step, batch in enumerate(batches):
            if step == 2:
                gpu.synchronize()
                started = time.perf_counter()
            self.loss(batch).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        gpu.synchronize()
        seconds = time.perf_counter() - started
        return sum(batch["input_ids"].numel() for batch in batches[2:]) / seconds, steps / seconds

    def gradients(self, numbers: list[int]) -> tuple[float, torch.Tensor]:
        """Loss and the adapter's gradients, averaged over the labels of some records."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        labels = [sum(label != -100 for label in self.dataset[number].labels) for number in numbers]
        total = 0.0
        for number, count in zip(numbers, labels, strict=True):
            loss = self.loss(self.inputs(number)) * count / sum(labels)
            loss.backward()
            total += loss.item()
        self.model.gradient_checkpointing_disable()
        return total, self.take_gradients()

    def our_gradients(self, numbers: list[int], output: Path) -> tuple[float, torch.Tensor]:
        """The same by this toolkit: packed, on a GPU compiled, half of the layers computed twice."""
        core = self.model.get_base_model()
        core.model.__class__, core.config.vision_config._attn_implementation = self.our_class, self.our_attention
        trainer = FinetuneTrainer(model=self.model, args=FinetuneArguments(output_dir=str(output)).begin())
        text, _ = take_over_layers(self.model, compiled=gpu.on_gpu(), packing=True)
        text.recomputed = text.count // 2
        length = -(-sum(len(self.dataset[number].input_ids) for number in numbers) // 128) * 128
        trainer.use_packs(self.dataset, [numbers], self.processor.encoder.control.pad, length)
        batch = trainer.data_collator([trainer.train_dataset[0]])
        loss = trainer.compute_loss(self.model, batch.to(self.device))
        loss.backward()
        return loss.item(), self.take_gradients()

    def take_gradients(self) -> torch.Tensor:
        gradients = torch.cat([p.grad.flatten().double() for p in self.parameters]).cpu()
        self.model.zero_grad()
        return gradients


def check(folder: Path, data: Path, device: torch.device, fp32: bool) -> None:
    """Compare losses and gradients: the usual recipe's, ours, and with fp32 those of an fp32 model as the truth."""
    recipe, numbers = UsualRecipe(folder, data, device, dropout=0.0), [0, 1]
    found = {"usual recipe": recipe.gradients(numbers), "this toolkit": recipe.our_gradients(numbers, data.parent)}
    if fp32:
        del recipe
        gpu.free_memory()
        recipe = UsualRecipe(folder, data, device, dropout=0.0)
        for parameter in recipe.model.parameters():
            parameter.data = parameter.data.float()
        recipe.dtype = torch.float32
        found["fp32"] = recipe.gradients(numbers)
    for name, (loss, gradients) in found.items():
        cosines = [
            f"{torch.nn.functional.cosine_similarity(gradients, other, dim=0).item():.5f} with {other_name}"
            for other_name, (_, other) in found.items()
            if other_name != name
        ]
        print(f"{name}: loss {loss:.5f}, cosine of the adapter's gradients {', '.join(cosines)}")


def run_train(folder: Path, data: Path, gpu_memory_gib: float | None, every: int, more: list[str]) -> tuple[float, str]:
    """Run train as a user would, with a log every so many steps: (tokens per second, peak GPU memory)."""
    with tempfile.TemporaryDirectory() as output:
        limit = ["--gpu_memory_gib", gpu_memory_gib] if gpu_memory_gib else []
        done = steps.run(
            "train", "--model_id", folder, "--dataset", data, "--output_dir", output, "--max_steps", 4 * every,
            "--logging_steps", every, "--learning_rate", "1e-4", "--save_strategy", "no", *more, *limit,
        )  # fmt: skip
        if done.code:
            sys.exit(f"train ended with {done.code}")
        return steps.tokens_per_second(steps.run_folder(done.lines)), steps.peak_memory(done.lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog="after --: arguments of train"
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--gpu_memory_gib", type=float)
    parser.add_argument("--steps", type=int, default=12, help="steps between two logs; four times as many are trained")
    parser.add_argument("--runs", type=int, default=2, help="runs of train: the first compiles, later ones need not")
    parser.add_argument("--check", action="store_true", help="compare loss and gradients instead of speed")
    parser.add_argument("--fp32", action="store_true", help="with --check: against fp32 too, which takes 110 GiB")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:end])
    args.more = words[end + 1 :]
    return args


def main() -> None:
    args = parse_arguments()
    device = pick_device(args.gpu_memory_gib)

    if args.check:
        check(args.model, args.data, device, args.fp32)
        return

    peak = gpu.matmul_peak()
    recipe = UsualRecipe(args.model, args.data, device, dropout=0.05)
    n = sum(p.numel() for p in recipe.model.get_base_model().model.language_model.layers.parameters())
    n -= sum(p.numel() for p in recipe.parameters)
    limit = peak / (4 * n)
    usual, pages = recipe.measure(2 * args.steps)
    usual_peak = gpu.peak_gib()
    del recipe
    gpu.free_memory()

    for _ in range(args.runs):
        rate, train_peak = run_train(args.model, args.data, args.gpu_memory_gib, args.steps, args.more)
    print(f"\n{gpu.device_name()}, matmul peak {peak / 1e12:.3g} TFLOP/s, N = {n / 1e9:.3g} billion")
    print("             tokens/s   of 4N limit   pages/s   peak GPU memory")
    print(f"usual recipe {usual:8,.0f}   {usual / limit:11.1%}   {pages:7.2f}   {usual_peak:.1f} GiB")
    print(f"train        {rate:8,.0f}   {rate / limit:11.1%}   {rate * pages / usual:7.2f}   {train_peak}")
    print(f"ratio        {rate / usual:8.2f}")


if __name__ == "__main__":
    main()
