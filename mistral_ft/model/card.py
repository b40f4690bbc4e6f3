"""README.md of an adapter or a merged model: the hub's metadata, and how it was made."""

import os
from pathlib import Path
from typing import Any

from mistral_ft.files import atomic_write
from mistral_ft.folders import LICENSES, is_hub_id
from mistral_ft.model.rounding import FOUR_BITS, rounding_of

# Settings of a run worth a line in its card; the others are in its run.json.
SHOWN_SETTINGS = (
    "learning_rate num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps "
    "lr_scheduler_type warmup_steps weight_decay seed vision_lr projector_lr"
).split()

WHAT = {"peft": "A LoRA adapter for {base}.", "transformers": "{base} with a LoRA adapter merged into its weights."}
USE = {
    "peft": """\
```python
from peft import PeftModel
from transformers import {auto_class}

base = {auto_class}.from_pretrained("{base_model}", dtype="bfloat16")
model = PeftModel.from_pretrained(base, "<this folder>")
```""",
    "transformers": """\
```python
from transformers import {auto_class}, {reader}

model = {auto_class}.from_pretrained("<this folder>", dtype="bfloat16", device_map="auto")
{reads} = {reader}.from_pretrained("<this folder>")
```

or `vllm serve <this folder>`.""",
}


def write_model_card(
    folder: str | os.PathLike,
    name: str,
    library: str,
    base_model: str,
    adapter: dict[str, Any],
    run: dict[str, Any],
    scores: dict[str, Any] | None = None,
) -> None:
    """Write a folder's README.md.

    Args:
        name: the model's.
        library: "peft" for an adapter, "transformers" for a merged model.
        base_model: hub id or folder.
        adapter: the content of adapter_config.json.
        run: that of run.json; empty for an adapter that train did not make.
        scores: from `card_scores`.
    """
    from huggingface_hub import ModelCardData  # slow to import

    known = is_hub_id(base_model)
    sees = (Path(folder) / "preprocessor_config.json").is_file()  # models that read text only have none
    data = ModelCardData(
        base_model=base_model if known else None,  # the hub takes ids only
        library_name=library,
        license=LICENSES.get(base_model),
        pipeline_tag="image-text-to-text" if sees else "text-generation",
        tags=["mistral3" if sees else "mistral", "lora"],
    )
    # A folder's path says more about its owner's machine than about the model.
    base = f"[{base_model}](https://huggingface.co/{base_model})" if known else f"`{Path(base_model).name}`"
    text = [f"---\n{data.to_yaml()}\n---\n", f"# {name}\n", WHAT[library].format(base=base) + "\n"]
    text += ["## Training\n", _table(_training(adapter, run))]
    if scores:
        text += ["## Scores\n", _table(scores)]
    use = USE[library].format(
        base_model=base_model if known else "<the base>",
        auto_class="AutoModelForImageTextToText" if sees else "AutoModelForCausalLM",
        reader="AutoProcessor" if sees else "AutoTokenizer",
        reads="processor" if sees else "tokenizer",
    )
    text += ["## Use\n", use + "\n"]
    text += ["The prompt is what the user wrote: no system message is added.\n"]
    with atomic_write(Path(folder) / "README.md") as file:
        file.write("\n".join(text))


def _training(adapter: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    if data := run.get("data"):
        for file in data["files"]:
            name = f"data: {Path(file['path']).name}"  # two in different folders may have one
            rows[name] = ", ".join(filter(None, [rows.get(name), f"SHA-256 `{file['sha256']}`"]))
        rows["records"] = f"{data['rows']:,}"
    kind = "DoRA" if adapter.get("use_dora") else "rank-stabilised LoRA" if adapter.get("use_rslora") else "LoRA"
    rows["adapter"] = f"{kind}, rank {adapter.get('r')}, alpha {adapter.get('lora_alpha')}"
    settings = run.get("settings", {})
    if rounding := rounding_of(settings.get("model", {})):
        rows["base while training"] = f"text layers rounded to {rounding}" + " (QLoRA, NF4)" * (rounding == FOUR_BITS)
    if init_adapter := settings.get("lora", {}).get("init_adapter"):
        start = Path(init_adapter)  # no folder of the user's is named
        run_name = f"{start.parent.name}/" if start.name.startswith("checkpoint-") else ""
        rows["adapter that it began with"] = run_name + start.name
    given = {**settings.get("lora", {}), **settings.get("training", {})}
    rows |= {name: given[name] for name in SHOWN_SETTINGS if name in given}
    if "versions" in run:
        rows["packages"] = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return rows


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])
