"""Prediction speed at full size: this toolkit's predict and the usual loop, in one run.

    python -m bench.random_24b /tmp/24b --tekken tekken_240911.json
    python -m bench.make_pages /tmp/pages --count 64
    python -m bench.predict_speed /tmp/24b /tmp/pages/pages.jsonl --gpu_memory_gib 78.5

The usual loop is what scripts with peft do: the adapter unmerged, one record at a time, transformers' own forward and
generate. Every answer has all its tokens on both sides, whatever the model would end earlier. The limit is 2N FLOP per
prompt token, what the vision tower's products and attention take at the same rate, and one sweep over the weights per
step of a batch at 4.3 TB/s.
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
from mistral_ft.data.records import read_records
from mistral_ft.model.device import pick_device
from mistral_ft.model.loading import load_base
from mistral_ft.prediction.batch_plan import page_lengths, plan
from mistral_ft.prediction.generator import Generator
from mistral_ft.prediction.trained_model import ModelFolders

BANDWIDTH = 4.3e12  # bytes per second that an H200 reads


def make_adapter(base: Path, data: Path, output: str, gpu_memory_gib: float | None) -> Path:
    """Train for one step, so fast that the adapter changes answers; the run's folder."""
    limit = ["--gpu_memory_gib", gpu_memory_gib] if gpu_memory_gib else []
    done = steps.run(
        "train", "--model_id", base, "--dataset", data, "--output_dir", output, "--max_steps", 1, "--learning_rate",
        "1e-2", "--packing", False, "--compile", False, "--gradient_checkpointing", True, "--save_strategy", "no",
        *limit,
    )  # fmt: skip
    if done.code:
        sys.exit(f"train ended with {done.code}")
    return steps.run_folder(done.lines)


@torch.inference_mode()
def usual_loop(model, dataset: RecordDataset, count: int, new_tokens: int) -> float:
    """Pages per second; reading pages is not counted, this once."""
    core = model.get_base_model().model
    core.__class__ = Mistral3Model
    core.config.vision_config._attn_implementation = "sdpa"
    device, inputs = model.device, []
    for number in range(count + 1):
        example, paths = dataset[number], dataset.records[number].image_paths
        fitter = dataset.processor.fitter
        pages = [torch.from_numpy(fitter.pixels(open_image(path, fitter))) for path in paths]
        inputs.append(
            {
                "input_ids": torch.tensor([example.input_ids], device=device),
                "attention_mask": torch.ones(1, len(example.input_ids), dtype=torch.int64, device=device),
                "pixel_values": torch.stack(pages).to(device, model.dtype),
                "image_sizes": torch.tensor(example.image_sizes, device=device),
            }
        )
    settings = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=11)
    for number, batch in enumerate(inputs):
        if number == 1:
            gpu.synchronize()
            started = time.perf_counter()
        model.generate(**batch, **settings)
    gpu.synchronize()
    return count / (time.perf_counter() - started)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path, help="records with a page and an expected answer each")
    parser.add_argument("--gpu_memory_gib", type=float)
    parser.add_argument("--new_tokens", type=int, default=20)
    parser.add_argument("--usual", type=int, default=12, help="records for the usual loop")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    records = read_records([args.data])
    if len(records) <= args.usual:
        sys.exit(f"{args.data}: the usual loop answers one record to warm up and {args.usual} more; lower --usual")

    with tempfile.TemporaryDirectory() as output:
        folders = ModelFolders.find(make_adapter(args.model, args.data, output, args.gpu_memory_gib))
        device, peak = pick_device(args.gpu_memory_gib), gpu.matmul_peak()
        processor = folders.load_processor()
        model = folders.adapter.put_on(load_base(args.model, device)).eval()
        usual = usual_loop(model, RecordDataset(records, processor, False), args.usual, args.new_tokens)
        del model
        gpu.free_memory()

        lengths = page_lengths(records, processor)
        batches = plan(lengths, folders, device, args.new_tokens)
        started = time.perf_counter()
        generator = Generator(folders, processor, device, args.new_tokens)
        gpu.synchronize()
        loading = time.perf_counter() - started

    decoder, parts = generator.decoder, {}
    decoder.eos = -1  # no id: an answer is as long as the usual loop's, which may not end earlier either

    def timed(name, function):
        def call(*arguments, **named):
            gpu.synchronize()
            before = time.perf_counter()
            result = function(*arguments, **named)
            gpu.synchronize()
            parts[name] = parts.get(name, 0.0) + time.perf_counter() - before
            return result

        return call

    def answer() -> float:
        before = time.perf_counter()
        answers = {number: a for part in generator.answer(records, batches) for number, a in part.items()}
        if short := [n for n, a in answers.items() if a.error or len(a.log_probs) != args.new_tokens]:
            sys.exit(f"{args.data}: not answered with {args.new_tokens} tokens: records {short}")
        return time.perf_counter() - before

    seconds = answer()
    # Once more, to see where the time goes: waiting for each part makes it a little slower.
    core = decoder.model.model
    core.get_image_features = timed("vision", core.get_image_features)
    decoder._prepare = timed("cache and graphs", decoder._prepare)
    decoder._read_prompts = timed("prompts, vision included", decoder._read_prompts)
    decoder.decode = timed("all but reading pages", decoder.decode)
    slower = answer()

    text, vision = core.language_model.layers, core.vision_tower.transformer.layers
    n = sum(p.numel() for p in text.parameters())
    patches = [4 * sum(r * c for r, c in processor.grids(record.image_paths)) for record in records]
    width = core.config.vision_config.hidden_size
    tower = sum(2 * sum(p.numel() for p in vision.parameters()) * k + 4 * k * k * width * len(vision) for k in patches)
    weights = sum(p.numel() * 2 for p in text.parameters()) + 2 * decoder.model.lm_head.weight.numel()
    limit = (2 * n * sum(lengths) + tower) / peak + args.new_tokens * len(batches) * weights / BANDWIDTH
    print(f"\n{gpu.device_name()}, matmul peak {peak / 1e12:.3g} TFLOP/s")
    print(
        f"{len(records)} records, {sum(lengths):,} prompt tokens, {args.new_tokens} new ones each, "
        f"{len(batches)} batches of up to {len(batches[0])}"
    )
    print(f"usual loop {usual:6.2f} pages/s")
    print(f"predict    {len(records) / seconds:6.2f} pages/s, {limit / seconds:.1%} of the limit, ", end="")
    print(f"{gpu.peak_gib():.1f} GiB, after {loading:.1f} s of loading and merging")
    print(f"ratio      {len(records) / seconds / usual:6.2f}")
    print(f"parts of {slower:.1f} s: " + ", ".join(f"{name} {part:.2f} s" for name, part in parts.items()))


if __name__ == "__main__":
    main()
