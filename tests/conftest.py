"""What tests share: small pages, a runner for the command lines, the embedded base."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from mistral_ft.errors import UserError
from mistral_ft.model.gpus import nvidia_cards, other_card, usable_gpus

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it runs in the background ignore Ctrl-C

# On a machine whose card torch cannot use, every step has its user choose the CPU; the tests choose it here.
try:
    card_is_unused = (nvidia_cards()[0] or other_card()) and not usable_gpus()
except UserError:
    card_is_unused = True
if card_is_unused:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

ROOT = Path(__file__).parents[1]
TINY = ROOT / "models/tiny"


def make_page(path: Path, number: int, size: tuple[int, int] = (84, 56)) -> None:
    """A small page that no other number has: bars where the number's bits are set."""
    image = Image.new("L", size, 255)
    draw = ImageDraw.Draw(image)
    for bit in range(8):
        if number >> bit & 1:
            draw.rectangle((bit * 10, 8, bit * 10 + 7, size[1] - 8), fill=0)
    image.save(path)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def row(
    number: int, expected: str | list[str] | None = None, images: list[str] | None = None, text: str = "Title?"
) -> dict:
    """A record with the given images after its text."""
    content = [{"type": "text", "text": text}, *({"type": "image", "image": image} for image in images or [])]
    record = {"id": number, "messages": [{"role": "user", "content": content}]}
    return record | ({"expected": expected} if expected is not None else {})


@pytest.fixture
def pages(tmp_path) -> Path:
    """A folder with train.jsonl: see `make_pages`."""
    return make_pages(tmp_path)


def make_pages(parent: Path) -> Path:
    """A folder with train.jsonl: pages of several sizes, two images in one row, text alone, a system message."""
    folder = parent / "pages"
    folder.mkdir()
    rows = []
    for number in range(8):
        make_page(folder / f"{number}.png", number + 1, (84, 56) if number % 3 else (56, 112))
        rows.append(row(number, f"Decree {number + 20} on Salt", [f"{number}.png"]))
    rows[5] = row(5, "Two pages", ["5.png", "1.png"])
    rows[6] = row(6, "Paris", text="What is the capital of France?")
    rows[7]["messages"].insert(0, {"role": "system", "content": "Be exact."})
    write_jsonl(folder / "train.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def few_pages(tmp_path_factory) -> Path:
    """A file of five records: three about a page, two without."""
    folder = tmp_path_factory.mktemp("pages")
    for number in range(3):
        make_page(folder / f"{number}.png", number + 1)
    rows = [row(number, f"Decree {number}", [f"{number}.png"] if number < 3 else None) for number in range(5)]
    return write_jsonl(folder / "data.jsonl", rows)


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """Call a step in this process: run_cli("score", "file.jsonl") -> (exit code, stdout, stderr)."""

    def run(module: str, *arguments) -> tuple[int, str, str]:
        step = __import__(module)
        monkeypatch.setattr(sys, "argv", [f"{module}.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            step.run_step(step.main)
        return stop.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def train_tiny(run_cli, tmp_path):
    """Train the embedded base for a few steps: train_tiny(dataset, *more arguments) -> run folder."""

    def train(dataset: Path, *arguments) -> Path:
        code, out, err = run_cli(
            "train", "--model_id", TINY, "--dataset", dataset, "--output_dir", tmp_path / "output",
            "--learning_rate", "2e-3", "--lora_dropout", "0", *arguments,
        )  # fmt: skip
        assert code == 0, err
        return Path(out.split("Adapter saved in ")[1].strip())

    return train


@pytest.fixture
def small_pages_base(tmp_path) -> Path:
    """The embedded base, but fed pages of at most 168 pixels: PDFs are drawn as large as a model is fed."""
    folder = tmp_path / "small-pages"
    folder.mkdir()
    for path in TINY.iterdir():
        (folder / path.name).symlink_to(path)
    settings = json.loads((TINY / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"size": {"longest_edge": 168}}))
    return folder
