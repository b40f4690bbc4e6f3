"""Every format in which people have their data trains: from the file to a falling loss."""

import base64
import io
import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

from mistral_ft.data.tables import open_table
from tests.conftest import make_page, write_jsonl

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "total", "arguments": '{"page": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "total", "parameters": {"type": "object", "properties": {}}}}]


def ask(*blocks):
    return {"role": "user", "content": [{"type": "text", "text": "Title?"}, *blocks]}


def say(text, **more):
    return {"role": "assistant", "content": text, **more}


def page(reference: str = "page.png"):
    return {"type": "image", "image": reference}


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def turns(*texts):
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(texts)]


# What the door takes as it is. Each row is learned 8 times.
DIRECT = {
    "native": {"messages": [ask(page())], "expected": "Decree 5"},
    "chat": {"messages": [ask(page()), say("Decree 5"), {"role": "user", "content": "Year?"}, say("1905")]},
    "chat with weights": {"messages": [ask(page()), say("No.", weight=0), {"role": "user", "content": "?"}, say("5")]},
    "function calling": {
        "messages": [
            ask(page()),
            say("", tool_calls=[CALL]),
            {"role": "tool", "tool_call_id": "abcdefghi", "content": '{"total": 5}'},
            say("5 in all."),
        ],
        "tools": TOOLS,
    },
    "plain text": {"text": "Article 1. The seller delivers the goods at the place that is agreed."},
    "[INST] text": {"text": "<s>[INST] Who delivers? [/INST] The seller.</s>[INST] Where? [/INST] As agreed.</s>"},
    "prompt and completion": {"prompt": "Who delivers?", "completion": "The seller."},
    "prompt and response": {"prompt": "Who delivers?", "response": "The seller.", "system": "Be brief."},
    "question and answer": {"question": "Title?", "answer": "Decree 5", "image": "page.png"},
    "prompt and completion in messages": {"prompt": [ask(page())], "completion": [say("Decree 5")]},
    "images in a column": {"messages": [ask({"type": "image"})], "images": ["page.png"], "expected": "Decree 5"},
}
# What reformat_data converts.
CONVERTED = {
    "alpaca": {"instruction": "Who delivers?", "input": "A contract.", "output": "The seller."},
    "sharegpt": {"conversations": turns("Who delivers?", "The seller.", "Where?", "As agreed.")},
    "llava": {"image": "page.png", "conversations": turns("<image>\nTitle?", "Decree 5")},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    open_table.cache_clear()
    make_page(tmp_path / "page.png", 5)
    return tmp_path


@pytest.fixture
def loss_falls(train_tiny):
    def check(path, *arguments):
        steps = ("--max_steps", 6, "--per_device_train_batch_size", 4, "--save_strategy", "no")
        run = train_tiny(path, *steps, *arguments)
        history = json.loads((run / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert len(losses) == 6
        assert losses[-1] < 0.8 * losses[0]

    return check


@pytest.mark.parametrize("name", DIRECT)
def test_rows_that_are_taken_as_they_are(folder, loss_falls, name):
    loss_falls(write_jsonl(folder / "train.jsonl", [DIRECT[name]] * 8))


@pytest.mark.parametrize("name", CONVERTED)
def test_rows_that_are_converted_first(folder, run_cli, loss_falls, name):
    path = write_jsonl(folder / "in.jsonl", [CONVERTED[name]] * 8)
    code, _, err = run_cli("train", "--dataset", path, "--model_id", "models/tiny", "--output_dir", folder / "output")
    assert code == 2
    assert f"which becomes a record by: python -m reformat_data {path} in-records.jsonl" in err
    assert run_cli("reformat_data", path, folder / "in-records.jsonl")[0] == 0
    loss_falls(folder / "in-records.jsonl")


def test_openai_rows_with_images_in_base64(folder, run_cli, loss_falls):
    part = {"type": "image_url", "image_url": {"url": data_url(folder / "page.png")}}
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Title?"}, part]}, say("Decree 5")]}
    path = write_jsonl(folder / "in.jsonl", [row] * 8)
    assert run_cli("reformat_data", path, folder / "in-records.jsonl")[0] == 0
    loss_falls(folder / "in-records.jsonl")


def test_a_json_array(folder, loss_falls):
    (folder / "train.json").write_text(json.dumps([DIRECT["native"]] * 8, indent=1))
    loss_falls(folder / "train.json")


@pytest.mark.parametrize("kind", ["bytes", "image"])
def test_a_parquet_file_with_images_in_it(folder, loss_falls, kind):
    data = (folder / "page.png").read_bytes()
    image = {"bytes": data, "path": None} if kind == "bytes" else Image.open(io.BytesIO(data))
    row = {"messages": [ask({"type": "image"})], "images": [image], "expected": "Decree 5"}
    datasets.Dataset.from_list([row] * 8).to_parquet(folder / "train.parquet")
    loss_falls(folder / "train.parquet")


def test_a_folder_of_the_datasets_library(folder, loss_falls):
    image = {"bytes": (folder / "page.png").read_bytes(), "path": None}
    row = {"question": "Title?", "answer": "Decree 5", "image": image}
    datasets.DatasetDict({"train": datasets.Dataset.from_list([row] * 8)}).save_to_disk(folder / "set")
    loss_falls(f"{folder / 'set'}:train")


def test_a_data_url(folder, loss_falls):
    row = {"messages": [ask(page(data_url(folder / "page.png")))], "expected": "Decree 5"}
    loss_falls(write_jsonl(folder / "train.jsonl", [row] * 8))


@pytest.mark.parametrize("kind", ["pdf", "tif"])
def test_pages_of_a_document(folder, loss_falls, small_pages_base, kind):
    pages = [Image.new("RGB", (84, 56), color) for color in ("white", "gray", "black")]
    pages[0].save(folder / f"doc.{kind}", save_all=True, append_images=pages[1:])
    rows = [{"messages": [ask(page(f"doc.{kind}#page=2"))], "expected": "gray"}] * 4
    rows += [{"messages": [ask(page(f"doc.{kind}#page=1-3"))], "expected": "three"}] * 4
    loss_falls(write_jsonl(folder / "train.jsonl", rows), "--model_id", small_pages_base)
