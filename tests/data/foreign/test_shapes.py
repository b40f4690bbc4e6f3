"""Rows as other toolkits and data sets have them: the pages that they promise reach the model, or they are refused."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest

from mistral_ft.data import collators
from mistral_ft.data.collators import TrainingCollator
from mistral_ft.data.dataset import RecordDataset
from mistral_ft.data.processor import Processor
from mistral_ft.data.records import read_records
from mistral_ft.data.tables import open_table
from mistral_ft.errors import UserError
from tests.conftest import TINY, make_page, write_jsonl

A, B = (56, 84), (112, 56)  # (height, width) of a.png and b.png
TOOLS = '[{"name": "total", "description": "Sum", "parameters": {"type": "object", "properties": {}}}]'
RECEIPT = {"company": "Decree Ltd", "date": "12/03/2018", "total": "9.00"}
FORM = [
    {"id": 0, "label": "question", "text": "TO:", "linking": [[0, 1]], "words": [], "box": [0, 0, 9, 9]},
    {"id": 1, "label": "answer", "text": "Salt Office", "linking": [[0, 1]], "words": [], "box": [9, 0, 9, 9]},
    {"id": 2, "label": "header", "text": "FAX", "linking": [], "words": [], "box": [0, 0, 9, 9]},
]


class Shape(NamedTuple):
    """Rows as they come: `file` is what is written, by its suffix, in the folder of the pages.

    Attributes:
        reformat: arguments of reformat_data after IN and OUT; None if every step takes the rows as they are.
        sizes: of the pages that the model must see; or the words with which the rows are refused.
    """

    file: str
    content: object
    sizes: list[tuple[int, int]] | str
    reformat: list[str] | None = None


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def chat(question, answer="Decree 5"):
    return [say("user", question), say("assistant", answer)]


def turns(*texts, names=("human", "gpt")):
    return [{"from": names[k % 2], "value": text} for k, text in enumerate(texts)]


def text(words):
    return {"type": "text", "text": words}


def bytes_of(name: str) -> Callable[[Path], dict]:
    """A page as the datasets library stores it, read when the folder is there."""
    return lambda folder: {"bytes": (folder / name).read_bytes(), "path": name}


def data_url(folder: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode((folder / 'a.png').read_bytes()).decode()}"


def listed(row: dict, **entry) -> dict[str, object]:
    """The files of a set of LLaMA-Factory."""
    return {"rows.json": [row], "dataset_info.json": {"mine": {"file_name": "rows.json", **entry}}}


AS_MESSAGES = {"messages": "messages", "images": "images"}
MESSAGE_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
ASK = ["--question", "Read the page."]
IMAGES = ["a.png", "b.png"]

SHAPES = {
    "LLaMA-Factory alpaca": Shape(
        "dataset_info.json", listed({"instruction": "Sum up.", "input": "Salt is taxed.", "output": "Tax"}), [], []
    ),
    "LLaMA-Factory alpaca, images": Shape(
        "dataset_info.json",
        listed(
            {"q": "<image>Title?", "a": "Decree 5", "images": ["a.png"]},
            columns={"prompt": "q", "response": "a", "images": "images"},
        ),
        [A],
        [],
    ),
    "LLaMA-Factory sharegpt": Shape(
        "dataset_info.json", listed({"conversations": turns("Q", "A")}, formatting="sharegpt"), [], []
    ),
    "LLaMA-Factory sharegpt, images": Shape(
        "dataset_info.json",
        listed(
            {"conversations": turns("<image>Title?", "A", "And <image>?", "B"), "images": IMAGES},
            formatting="sharegpt",
            columns={"messages": "conversations", "images": "images"},
        ),
        [A, B],
        [],
    ),
    "LLaMA-Factory sharegpt, tools": Shape(
        "dataset_info.json",
        listed(
            {
                "conversations": [
                    *turns("<image>Total?", '{"name": "total", "arguments": {}}', names=("human", "function_call")),
                    *turns("9.00", "Nine.", names=("observation", "gpt")),
                ],
                "tools": TOOLS,
                "scans": ["a.png"],
            },
            formatting="sharegpt",
            columns={"messages": "conversations", "tools": "tools", "images": "scans"},
        ),
        [A],
        [],
    ),
    "LLaMA-Factory OpenAI tags": Shape(
        "dataset_info.json",
        listed(
            {"messages": chat("<image>Title?"), "images": ["b.png"]},
            formatting="sharegpt",
            columns=AS_MESSAGES,
            tags=MESSAGE_TAGS,
        ),
        [B],
        [],
    ),
    "LLaMA-Factory ranking": Shape(
        "dataset_info.json",
        listed({}, ranking=True, columns={"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}),
        "mine: `ranking` is for training on preferences, which is not done here",
        [],
    ),
    "LLaMA-Factory KTO": Shape(
        "dataset_info.json",
        listed({}, formatting="sharegpt", columns={"messages": "messages", "kto_tag": "label"}),
        "mine: `kto_tag`: preferences cannot be trained on here",
        [],
    ),
    "LLaMA-Factory video": Shape(
        "dataset_info.json",
        listed({}, formatting="sharegpt", columns={"messages": "messages", "videos": "videos"}),
        "mine: `videos`: videos cannot be trained on here",
        [],
    ),
    "ms-swift messages": Shape(
        "rows.jsonl", [{"messages": chat("<image><image>Title?"), "images": IMAGES}], [A, B], None
    ),
    "ms-swift query": Shape(
        "rows.jsonl",
        [{"query": "And <image>?", "response": "B", "history": [["<image>Title?", "A"]], "images": IMAGES}],
        [A, B],
        None,
    ),
    "ms-swift conversations": Shape(
        "rows.jsonl",
        [{"conversations": turns("<image>Title?", "A", names=("user", "assistant")), "images": ["a.png"]}],
        [A],
        [],
    ),
    "ms-swift blocks": Shape(
        "rows.jsonl", [{"messages": chat([{"type": "image", "image": "b.png"}, text("Title?")])}], [B], None
    ),
    "ms-swift tools": Shape(
        "rows.jsonl",
        [
            {
                "messages": [
                    say("user", "<image>Total?"),
                    say("tool_call", '{"name": "total", "arguments": {}}'),
                    say("tool_response", "9.00"),
                    say("assistant", "Nine."),
                ],
                "tools": TOOLS,
                "images": ["a.png"],
            }
        ],
        [A],
        None,
    ),
    "ms-swift objects": Shape(
        "rows.jsonl",
        [
            {
                "messages": chat("<image>Where is <ref-object>?", "<bbox>"),
                "images": ["a.png"],
                "objects": {"ref": ["salt"], "bbox": [[1, 2, 3, 4]]},
            }
        ],
        "has boxes of objects, which must stand in the text itself (`objects`)",
        None,
    ),
    "TRL image blocks": Shape(
        "rows.jsonl", [{"messages": chat([{"type": "image"}, text("Title?")]), "images": ["a.png"]}], [A], None
    ),
    "TRL prompt and completion": Shape(
        "rows.jsonl",
        [{"prompt": [chat("Title?")[0]], "completion": [chat("Title?")[1]], "images": IMAGES}],
        [A, B],
        None,
    ),
    "TRL texts": Shape("rows.jsonl", [{"prompt": "Title?", "completion": "Decree 5", "image": "a.png"}], [A], None),
    "TRL preferences": Shape(
        "rows.jsonl",
        [{"prompt": "Title?", "chosen": "A", "rejected": "B", "images": ["a.png"]}],
        "has `chosen`: rows of preferences are not learned here",
        None,
    ),
    "unsloth in parquet": Shape(
        "rows.parquet",
        [{"messages": chat([text("Title?"), {"type": "image"}], [text("Decree 5")]), "images": [bytes_of("b.png")]}],
        [B],
        None,
    ),
    "unsloth conversations": Shape(
        "rows.jsonl", [{"conversations": chat("Title?"), "image": "a.png"}], [A], []
    ),
    "unsloth image and text": Shape(
        "rows.parquet",
        [{"image": bytes_of("a.png"), "text": "x^2"}],
        'has `image`, but no question about it; if `text` is what the page says, this makes records of it: python -m '
        'reformat_data IN OUT --question "Read the page." --map answer=text --map image=image',
        None,
    ),
    "LaTeX pages": Shape(
        "rows.parquet",
        [{"image": bytes_of("a.png"), "text": "x^2"}],
        [A],
        [*ASK, "--map", "answer=text", "--map", "image=image"],
    ),
    "DocVQA": Shape(
        "rows.parquet",
        [{"questionId": "3", "question": "Title?", "image": bytes_of("a.png"), "answers": ["Decree 5", "No. 5"]}],
        [A],
        None,
    ),
    "DocVQA as published": Shape(
        "val.json",
        {
            "dataset_name": "SP-DocVQA",
            "data": [{"questionId": 3, "question": "Title?", "image": "a.png", "answers": ["Decree 5"]}],
        },
        [A],
        None,
    ),
    "TextVQA": Shape(
        "rows.parquet",
        [{"image_id": "a", "question": "Title?", "image": bytes_of("b.png"), "answers": ["Decree 5"] * 10}],
        [B],
        None,
    ),
    "TextVQA as published": Shape(
        "val.json",
        {"data": [{"question": "Title?", "image_id": "a", "answers": ["Decree 5"] * 10}]},
        [A],
        ["--map", "prompt=question", "--map", "answer=answers", "--map", "image={image_id}.png"],
    ),
    "TextVQA as published, unmapped": Shape(
        "val.json",
        {"data": [{"question": "Title?", "image_id": "a", "answers": ["Decree 5"] * 10}]},
        "`image_id` looks like a page, and nobody would see it: python -m reformat_data IN OUT --map prompt=question "
        "--map answer=answers --map image=image_id",
        None,
    ),
    "Donut": Shape(
        "metadata.jsonl",
        [{"file_name": "a.png", "ground_truth": json.dumps({"gt_parse": RECEIPT})}],
        [A],
        [*ASK, "--map", "json=ground_truth.gt_parse", "--map", "image=file_name"],
    ),
    "CORD": Shape(
        "rows.parquet",
        [{"image": bytes_of("a.png"), "ground_truth": json.dumps({"gt_parse": RECEIPT, "valid_line": []})}],
        [A],
        [*ASK, "--map", "json=ground_truth.gt_parse", "--map", "image=image"],
    ),
    "SROIE": Shape(
        "key",
        {"key/a.txt": RECEIPT, "key/b.txt": RECEIPT},
        [A, B],
        [*ASK, "--map", "json=json", "--map", "image={stem}.png"],
    ),
    "FUNSD": Shape(
        "annotations", {"annotations/a.json": {"form": FORM}}, [A], [*ASK, "--format", "funsd"]
    ),
    "Label Studio": Shape(
        "export.json",
        [
            {
                "id": 3,
                "data": {"image": "/data/local-files/?d=a.png"},
                "annotations": [
                    {
                        "result": [
                            {"id": "x", "type": "choices", "from_name": "kind", "value": {"choices": ["Receipt"]}},
                            {"id": "r", "type": "rectanglelabels", "value": {"rectanglelabels": ["Total"], "x": 1}},
                            {"id": "r", "type": "textarea", "value": {"text": ["9.00"], "x": 1, "width": 3}},
                        ]
                    }
                ],
            }
        ],
        [A],
        [*ASK, "--format", "label_studio"],
    ),
    "OpenAI fine-tuning": Shape(
        "rows.jsonl",
        lambda folder: [
            {"messages": chat([text("Title?"), {"type": "image_url", "image_url": {"url": data_url(folder)}}])}
        ],
        [A],
        [],
    ),
    "images in parquet, by path": Shape(
        "rows.parquet",
        [{"question": "Title?", "answer": "Decree 5", "image": {"bytes": None, "path": "b.png"}}],
        [B],
        None,
    ),
    "imagefolder, jsonl": Shape(
        "metadata.jsonl",
        [{"file_name": "b.png", "question": "Title?", "answer": "Decree 5"}],
        "`file_name` looks like a page, and nobody would see it: python -m reformat_data IN OUT --map prompt=question "
        "--map answer=answer --map image=file_name",
        None,
    ),
    "imagefolder, csv": Shape(
        "metadata.csv",
        "file_name,text\na.png,Decree 5\n",
        [A],
        [*ASK, "--map", "answer=text", "--map", "image=file_name"],
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    open_table.cache_clear()


def make_folder(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    for parent in (folder, folder / "images"):
        make_page(parent / "a.png", 1)
        make_page(parent / "b.png", 2, (56, 112))
    return folder


def filled(value, folder):
    """A row with its pages in it."""
    if callable(value):
        return filled(value(folder), folder)
    if isinstance(value, dict):
        return {name: filled(inner, folder) for name, inner in value.items()}
    return [filled(inner, folder) for inner in value] if isinstance(value, list) else value


def write(shape: Shape, folder: Path) -> Path:
    content, path = filled(shape.content, folder), folder / shape.file
    if shape.file.endswith(".parquet"):
        datasets.Dataset.from_list(content).to_parquet(path)
    elif shape.file.endswith(".jsonl"):
        write_jsonl(path, content)
    elif shape.file.endswith(".csv"):
        path.write_text(content)
    elif shape.file.startswith(("dataset_info", "key", "annotations")):
        for name, data in content.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(json.dumps(data, indent=1))
    else:
        path.write_text(json.dumps(content, indent=1))
    return path


def convert(run_cli, shape: Shape, path: Path) -> tuple[Path, str]:
    """The rows as the steps take them, and what reformat_data says if it writes none."""
    if shape.reformat is None:
        return path, ""
    code, _, err = run_cli("reformat_data", path, path.parent / "records.jsonl", *shape.reformat)
    return path.parent / "records.jsonl", err if code else ""


@pytest.fixture
def seen(monkeypatch):
    """The (height, width) of every page in a batch, in order; that there are pixels of each is checked."""
    found = []
    images = collators._images

    def count(examples):
        batch = images(examples)
        sizes = batch.get("image_sizes", [])
        assert sum(height * width // 14**2 for height, width in sizes) == len(batch.get("pixel_values", []))
        found.extend(sizes)
        return batch

    monkeypatch.setattr(collators, "_images", count)
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_pages_reach_the_batch_or_rows_are_refused(tmp_path, run_cli, seen, name):
    path, reason = convert(run_cli, SHAPES[name], write(SHAPES[name], make_folder(tmp_path / "set")))
    if not reason:
        try:
            records = read_records([path], expected_required=True)
        except UserError as error:
            reason = str(error)
            assert reason.startswith(f"{path}:1: ")
    if isinstance(SHAPES[name].sizes, str):
        assert SHAPES[name].sizes in reason
        return
    assert reason == ""
    dataset = RecordDataset(records, Processor.from_folder(TINY))
    TrainingCollator(0)([[dataset[k] for k in range(len(dataset))]])
    assert seen == SHAPES[name].sizes


@pytest.mark.slow
def test_every_step_sees_them(tmp_path, run_cli, seen):
    """The table of shapes and steps, printed with -s: how many pages each step saw, or that it refused the rows."""
    lines, wrong = [], []
    for name, shape in SHAPES.items():
        folder = make_folder(tmp_path / str(len(lines)))
        data, reason = convert(run_cli, shape, write(shape, folder))
        cells, refusals = [], [reason] if reason else []
        steps = {
            "validate_data": [data, "--model_id", TINY],
            "train": ["--model_id", TINY, "--dataset", data, "--output_dir", folder / "output", "--max_steps", 1,
                      "--save_strategy", "no", "--per_device_train_batch_size", 2],
            "predict": [data, TINY, "-o", folder / "p.jsonl", "--max_new_tokens", 1],
        }  # fmt: skip
        for step, arguments in steps.items() if not refusals else ():
            seen.clear()
            code, out, err = run_cli(step, *arguments)
            refusals += [out + err] if code else []
            pages = [int(count) for count in re.findall(r"^\d+ rows, (\d+) images$", out, re.MULTILINE)]
            sizes = pages[0] if pages else sorted(seen)
            cells.append("refused" if code else str(sizes if pages else len(sizes)))
            expected = len(shape.sizes) if step == "validate_data" else sorted(shape.sizes)
            if not isinstance(shape.sizes, str) and (code or sizes != expected):
                wrong.append(f"{name}, {step}: {sizes} instead of {expected}: {err}")
        if isinstance(shape.sizes, str):
            wrong += [] if refusals and all(shape.sizes in text for text in refusals) else [f"{name}: {refusals}"]
            cells = cells or ["refused"] * 3
        promised = "refused" if isinstance(shape.sizes, str) else str(len(shape.sizes))
        lines.append(f"{name:32} {promised:>9} {cells[0]:>9} {cells[1]:>9} {cells[2]:>9}")
    print(f"\n{'':32} {'promised':>9} {'validate':>9} {'train':>9} {'predict':>9}", *lines, sep="\n")
    assert not wrong, "\n".join(wrong)
