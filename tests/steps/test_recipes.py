"""Every recipe of docs/recipes.md, run as it stands there on data made here, and what comes after training.

Commands are taken out of the document. What is changed: train's are given the tiny base and few steps by flags behind
their own, <name> becomes the run's name, and the test set of "After training" the recipe's own.
"""

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mistral_ft.review.desk import Desk
from mistral_ft.review.log import Review, ReviewLog
from tests.conftest import ROOT, TINY, make_page, read_rows, row, write_jsonl

DOCUMENT = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
AFTER = "After training"


def blocks(language: str) -> dict[str, list[str]]:
    """The lines of the document's blocks in a language by the heading above them, continued lines joined."""
    found: dict[str, list[str]] = {}
    heading = block = None
    for line in DOCUMENT.replace("\\\n", "").splitlines():
        if line.startswith("```"):
            block = line.removeprefix("```") if block is None else None
        elif block is None and line.startswith("#"):
            heading = line.lstrip("# ")
        elif block == language:
            found.setdefault(heading, []).append(line)
    return found


RECIPES = blocks("bash")


TOWNS = "Bree Dale Rohan Tyrn Esgar Lorn Umbar Arnor Minas Gondor Salem Perth Ayr Fife Oban Leith Cork Derry Sligo Tara"
TOWNS = TOWNS.split()
ANSWERS = ("Granted", "Refused")


def pages(folder: Path) -> None:
    """Questions about a page, in contracts.jsonl about two; the test set is a part of what is learned."""
    (folder / "data").mkdir()
    records, contracts = [], []
    for number, town in enumerate(TOWNS):
        for page in (number, number + len(TOWNS)):
            make_page(folder / f"data/{page}.png", 5 * page + 1)
        answer = ANSWERS[number % 2]
        records.append(row(number, answer, [f"{number}.png"], text=f"{answer[0]}. Salt for {town}?"))
        shown = [f"{number}.png", f"{number + len(TOWNS)}.png"]
        contracts.append(row(number, answer, shown, text=f"{answer[0]}. Salt for {town}?"))
    write_jsonl(folder / "data/train.jsonl", records)
    write_jsonl(folder / "data/test.jsonl", records[:10])
    write_jsonl(folder / "data/contracts.jsonl", contracts)


def inst(folder: Path) -> None:
    texts = [
        f"<s>[INST] {ANSWERS[n % 2][0]}. Salt for {town}? [/INST] {ANSWERS[n % 2]}</s>" for n, town in enumerate(TOWNS)
    ]
    write_jsonl(folder / "inst.jsonl", [{"text": text} for text in texts])


def domain(folder: Path) -> None:
    texts = [f"Salt is taxed by weight in {town}, and the toll of {town} is paid in salt." for town in TOWNS]
    write_jsonl(folder / "domain.jsonl", [{"text": text} for text in texts])


def calls(folder: Path) -> None:
    """The document's own record, and questions whose answer is its call."""
    example = json.loads(blocks("json")["Function calling"][0])
    rows = []
    for number in range(19):
        asked = {"role": "user", "content": f"Weather in Bree at {number}?"}
        rows.append({"id": number, "tools": example["tools"], "messages": [asked, example["messages"][1]]})
    write_jsonl(folder / "calls.jsonl", [example, *rows])
    write_jsonl(folder / "calls.test.jsonl", rows[:6])


def sample(folder: Path) -> None:
    (folder / "dataset").symlink_to(ROOT / "dataset")


@dataclass
class Case:
    """What a recipe is run on, and what its steps must have printed in the end.

    Attributes:
        write: makes its data in a folder.
        test: the file that "After training" answers; where its images are elsewhere, with the flag that says where.
        says: parts of the steps' output.
        flags: given to train behind the recipe's own.
        base: name of a random model to make; None: models/tiny.
        first: the recipe to run before this one, on the same data.
    """

    write: Callable[[Path], None]
    test: str
    says: list[str]
    flags: list = field(default_factory=list)
    base: str | None = None
    first: str | None = None


# So many steps that an answer is right whatever the order of sums: with six seeds, the least likely of the ten right
# answers has a probability of 0.998 (after 16 steps at 5e-3: 0.78, and another number of threads could change it).
STEPS = [
    "--per_device_train_batch_size", 8, "--lora_dropout", 0, "--learning_rate", "3e-3", "--max_steps", 32,
    "--warmup_steps", 4, "--lr_scheduler_type", "cosine",
]  # fmt: skip
# For random models; with five seeds the least likely right answer has a probability of 0.93.
FAST = [*STEPS[:4], "--learning_rate", "1e-2", "--max_steps", 48]
HALVES = ["--eval_steps", 16, "--eval_generate", 2]
SAME = ": 0 answers differ between the adapter unmerged and merged"
CASES = {
    "Recipes": Case(
        pages, "data/test.jsonl", ["30 rows, 30 images", "0 fatal problems", "Accuracy = 10/10 ", SAME],
        [*STEPS, *HALVES],
    ),
    "Documents, on one card of 80 GB": Case(
        pages, "data/test.jsonl", ["eval loss ", "Accuracy = 10/10 ", SAME], [*STEPS, *HALVES]
    ),
    "Documents, on a card of 24 GB, in 4 bits": Case(
        pages, "data/test.jsonl", ["Accuracy = 10/10 ", "(rounded to 4 bits) and has learned", SAME], STEPS
    ),
    "Documents, in FP8, on an Ada or Hopper card": Case(
        pages, "data/test.jsonl", ["Accuracy = 10/10 ", "(rounded to FP8) and has learned", SAME], [*STEPS, *HALVES]
    ),
    "More pages to a record": Case(pages, "data/contracts.jsonl", ["Accuracy = 20/20 ", SAME], [*STEPS, *HALVES]),
    "`[INST]` rows of text": Case(
        inst, "records.test.jsonl", ["18 records in records.train.jsonl", "Accuracy = 2/2 ", SAME], [*STEPS, *HALVES]
    ),
    "Mistral-7B, on a card of 12 GB": Case(inst, "records.test.jsonl", ["Accuracy = 2/2 ", SAME], FAST, "7B v0.3"),
    "Domain text": Case(
        domain, "domain.jsonl", ["on 20 plain texts, 588 tokens", "Compared on 16 plain texts"],
        [*STEPS, "--eval_steps", 16, "--learning_rate", "1e-3"],
    ),
    "Function calling": Case(
        calls, "calls.test.jsonl", ["Accuracy = 6/6 ", SAME], [*FAST, *HALVES], "Small 3.2"
    ),
    "Go on with corrected data": Case(
        pages, "data/test.jsonl", ["20 records in corrected.jsonl: 1 corrected, 1 reviewed, 0 flagged"],
        [*STEPS, *HALVES], first="Documents, on one card of 80 GB",
    ),
    "Several GPUs": Case(pages, "data/test.jsonl", ["2 processes", "Accuracy = 10/10 ", SAME], STEPS),
    "Trackers": Case(pages, "data/test.jsonl", ["Accuracy = 10/10 ", SAME], [*STEPS, *HALVES]),
    "Against overfitting": Case(
        sample, "others.jsonl --images_dir dataset", ["eval loss rose after step ", SAME], ["--num_train_epochs", 10]
    ),
}  # fmt: skip
SLOW = {
    "Trackers",
    "Go on with corrected data",
    "Recipes",
    "Documents, on a card of 24 GB, in 4 bits",
    "More pages to a record",
    "Several GPUs",
    "Against overfitting",
}


@dataclass
class Shell:
    """Runs the lines of recipes in a folder.

    Attributes:
        run: the newest run.
        printed: what the steps have printed.
    """

    folder: Path
    run_cli: Callable
    flags: list
    run: Path | None = None
    printed: str = ""

    def __call__(self, line: str) -> None:
        line = line.replace("<name>", self.run.name if self.run else "<name>")
        words = shlex.split(line, comments=True)
        if words[:2] == ["pip", "install"]:
            assert (ROOT / words[-1]).is_file() or words[-1] in (ROOT / "requirements-dev.txt").read_text()
        elif words[:2] == ["python", "-m"]:
            self.step(words[2], words[3:])
        elif words[0] == "torchrun":
            self.step(words[words.index("-m") + 1], words[words.index("-m") + 2 :], words[1 : words.index("-m")])
        else:
            subprocess.run(line, shell=True, cwd=self.folder, check=True)

    def step(self, module: str, words: list[str], launch: list[str] | None = None) -> None:
        if module == "server" and "--export" not in words:
            return self.review(Path(words[0]))
        words = [*words, *map(str, self.flags)] if module == "train" else words
        if launch:
            command = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", module, *words]
            path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=self.folder, env=os.environ | path, capture_output=True, text=True)
            code, out, err = done.returncode, done.stdout, done.stderr
        else:
            code, out, err = self.run_cli(module, *words)
        assert code == 0, err
        self.printed += out
        if module == "train":
            self.run = self.folder / re.search(r"Adapter saved in (.+)", out)[1]

    def review(self, path: Path) -> None:
        """What a person does in the browser: correct the first row."""
        log = ReviewLog(path)
        desk = Desk(path, log)
        asyncio.run(desk.begin())
        desk.save(0, Review(expected="Corrected", reviewed=True))
        log.close()


def test_every_recipe_has_data_to_be_run_on():
    assert CASES.keys() | {AFTER} == RECIPES.keys()


@pytest.mark.parametrize(
    "heading", [pytest.param(heading, marks=[pytest.mark.slow] * (heading in SLOW)) for heading in CASES]
)
def test_it_trains_predicts_scores_and_merges(heading, run_cli, tmp_path, monkeypatch):
    case = CASES[heading]
    base = TINY
    if case.base:
        pytest.importorskip("mistral_common")  # not to be had for Python 3.10
        from tests.helpers.tiny_models import sharpen, write_model

        base = write_model(tmp_path / "base", case.base)
        sharpen(base / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    case.write(tmp_path)
    for name, lines in blocks("yaml").items():
        if name == heading:
            (tmp_path / lines[0].removeprefix("# ")).write_text("\n".join(lines))
    shell = Shell(tmp_path, run_cli, ["--model_id", base, *case.flags])
    for line in [*RECIPES.get(case.first, []), *RECIPES[heading]]:
        shell(line)
    for line in RECIPES[AFTER]:
        shell(line.replace("data/test.jsonl", case.test))

    losses = [line["loss"] for line in read_rows(shell.run / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    asked, answered = read_rows(case.test.split()[0]), read_rows(f"{shell.run.name}.jsonl")
    assert [row | line for row, line in zip(asked, answered, strict=True)] == answered
    assert all("actual" in line or line["nll"] > 0 for line in answered)
    for part in case.says:
        assert part in shell.printed
    assert (tmp_path / f"merged/{shell.run.name}/config.json").is_file()


@pytest.mark.slow
def test_the_job_for_a_script(tmp_path):
    script = "\n".join(blocks("sh")["A job for a script"])
    for name in ("dataset", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}

    def run(**changes) -> subprocess.CompletedProcess:
        text = script
        for old, new in changes.values():
            assert text.count(old) == 1
            text = text.replace(old, new)
        return subprocess.run(["bash", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True)

    wrong = run(data=("--dataset dataset/train.jsonl", "--dataset dataset/none.jsonl"))
    assert wrong.returncode == 1
    assert (tmp_path / "train.log").read_text() == "error: dataset/none.jsonl: no such file\n"
    # Two steps teach too little for 90 %.
    done = run(steps=("--num_train_epochs 2", "--max_steps 2"), score=("--fail_under 0.9", "--fail_under 0"))
    assert done.returncode == 0, done.stderr
    assert "\ndone, step 2/2, " in done.stdout
    assert json.loads((tmp_path / "score.json").read_text())["count"] == 100
    assert [path.name for path in (tmp_path / "merged").iterdir()] == [
        path.name for path in (tmp_path / "output").iterdir()
    ]
