"""Every script of bench/ from its arguments to its last line, on a small model and on a CPU.

What they measure is of use on a GPU only. Here it shows that each call they make into the toolkit still fits. Steps
that import torch run in this process instead of one of their own; `-m slow` runs the scripts as a user does.
"""

import contextlib
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import four_bit, gpu, soak, steps, two_gpus
from bench.make_pages import make_pages
from mistral_ft.model import attention
from mistral_ft.model import loading as model
from mistral_ft.training.arguments import ModelArguments, TrainParser
from mistral_ft.training.training_arguments import FinetuneArguments
from tests.conftest import ROOT, TINY, read_rows

SCRIPTS = sorted(path.stem for path in (ROOT / "bench").glob("*.py") if "def main(" in path.read_text())
NUMBER = r"[\d,]*\.?\d+"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    """Where `python -m bench.…` is run, on a CPU; what a script changes of the process is put back."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for owner, name in ((sys, "argv"), (attention, "varlen_attn"), (model, "load_base"), (model, "shard_layers")):
        monkeypatch.setattr(owner, name, getattr(owner, name))


@pytest.fixture
def bench(capfd):
    """Call a script in this process: bench("soak", "--steps", 1) -> what it and the processes it starts print."""

    def run(script: str, *arguments, end: str | None = None) -> str:
        sys.argv = [f"{script}.py", *map(str, arguments)]
        capfd.readouterr()
        with pytest.raises(SystemExit, match=end) if end else contextlib.nullcontext():
            importlib.import_module(f"bench.{script}").main()
        return capfd.readouterr().out

    return run


def run_here(module: str, *arguments) -> tuple[int, list[str]]:
    """Run a step in this process; its exit code, and its lines on stdout and stderr."""
    step, written = importlib.import_module(module), io.TextIOWrapper(io.BytesIO(), "utf-8")
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module}.py", *map(str, arguments)])
        patch.setattr(sys, "stdout", written)
        patch.setattr(sys, "stderr", written)
        try:
            step.main() if module.startswith("bench.") else step.run_step(step.main)
        except SystemExit as stop:
            code = stop.code or 0
    written.flush()
    return code, written.buffer.getvalue().decode().splitlines()


@pytest.fixture
def started(monkeypatch):
    """Have the steps that a script starts run in this process, where torch is imported already; the calls."""
    calls = []

    def run(module, *arguments, processes=1, environment=None, seconds=0.0, shown=True) -> steps.Step:
        calls.append((module, processes, *map(str, arguments)))
        words, holds = list(map(str, arguments)), []
        if "--shard_base" in words:  # which one process cannot
            at = words.index("--shard_base")
            del words[at : at + 2]
            holds = ["Each process holds half"]
        code, lines = run_here(module, *words)
        return steps.Step(code, [*holds, *lines], 0.5, 0.75)

    def start(module, *arguments):
        code, lines = run_here(module, *arguments)
        return SimpleNamespace(communicate=lambda: ("\n".join(lines), None), returncode=code)

    monkeypatch.setattr(steps, "run", run)
    monkeypatch.setattr(steps, "start", start)
    return calls


@pytest.fixture(scope="module")
def small_pages(tmp_path_factory) -> Path:
    return make_pages(tmp_path_factory.mktemp("bench") / "pages", count=4, scale=0.1)


def test_train_speed(bench, started, small_pages):
    out = bench("train_speed", TINY, small_pages, "--steps", 1, "--runs", 1, "--", "--lora_rank", 4)
    assert re.search(rf"^CPU, matmul peak {NUMBER} TFLOP/s, N = 0.00315 billion$", out, re.MULTILINE)
    assert re.search(rf"^usual recipe +{NUMBER} +{NUMBER}% +{NUMBER}   0.0 GiB$", out, re.MULTILINE)
    assert re.search(rf"^train +{NUMBER} +{NUMBER}% +{NUMBER}   0.0 GiB\nratio +{NUMBER}$", out, re.MULTILINE)
    ((module, _, *words),) = started
    assert (module, words[-2:]) == ("train", ["--lora_rank", "4"])


def test_train_speed_check(bench, small_pages):
    """In fp32 on a CPU both sides and the truth are the same."""
    out = bench("train_speed", TINY, small_pages, "--check", "--fp32")
    found = re.findall(
        r"^(.+): loss (.+), cosine of the adapter's gradients (.+) with (.+), (.+) with (.+)$", out, re.M
    )
    assert [(line[0], line[3], line[5]) for line in found] == [
        ("usual recipe", "this toolkit", "fp32"), ("this toolkit", "usual recipe", "fp32"),
        ("fp32", "usual recipe", "this toolkit"),
    ]  # fmt: skip
    assert {line[1] for line in found} == {found[0][1]}
    assert min(float(cosine) for line in found for cosine in (line[2], line[4])) > 0.9999


def test_predict_speed(bench, started, small_pages):
    out = bench("predict_speed", TINY, small_pages, "--usual", 2, "--new_tokens", 6)
    assert re.search(r"^4 records, [\d,]+ prompt tokens, 6 new ones each, 1 batches of up to 4$", out, re.MULTILINE)
    assert re.search(rf"^predict +{NUMBER} pages/s, {NUMBER}% of the limit, 0.0 GiB, after", out, re.MULTILINE)
    parts = ("cache and graphs", "vision", "prompts, vision included", "all but reading pages")
    assert re.search(" s, ".join(rf"{part} {NUMBER}" for part in parts), out)
    assert [module for module, *_ in started] == ["train"]
    bench("predict_speed", TINY, small_pages, end="the usual loop answers one record to warm up and 12 more")


@pytest.mark.parametrize("stage", ["7b", "24b"])
def test_four_bit(bench, started, tmp_path, stage):
    pytest.importorskip("bitsandbytes")
    out = bench("four_bit", tmp_path / "four", "--tiny", "--stages", stage)
    results = out[out.rindex("\nCPU\n") :].splitlines()[2:]
    assert len(results) == 5
    assert all(re.search(rf" 0.0 GiB of (12|24), +{NUMBER} tokens/s, ", line) for line in results[:3])
    assert all(re.search(rf"eight .+ 0.0 GiB of (12|24), {NUMBER} s in all", line) for line in results[3:])


def test_four_bit_ends_with_what_it_could_not_measure(monkeypatch, tmp_path):
    monkeypatch.setattr(steps, "run", lambda *arguments, **named: steps.Step(2, ["error: no"]))
    bench = four_bit.Bench(tmp_path, seconds=60, steps_trained=3)
    assert bench.train("7B", TINY, tmp_path / "texts.jsonl", 12) is None
    assert bench.failed == ["7B"]
    assert [line.split() for line in bench.results] == [["7B", "failed"]]


def test_two_gpus(bench, started, tmp_path):
    out = bench("two_gpus", tmp_path / "two", "--tiny", "--pages", 4, "--steps", 1)
    assert re.search(r"tiny-2: 2 losses, .+ largest relative difference \d", out)
    assert re.search(rf"two GPUs, a copy of the base each: {NUMBER} tokens/s, 0.0 GiB\n", out)
    assert out.endswith("saved: adapter_config.json, adapter_model.safetensors\n")
    assert [(module, processes) for module, processes, *_ in started] == [
        ("bench.two_gpus", 1), ("bench.two_gpus", 2), ("bench.two_gpus", 2), ("train", 1), ("train", 2), ("train", 2)
    ]  # fmt: skip


def test_two_gpus_attention_is_the_toolkits(monkeypatch):
    """What takes varlen_attn's place there is called as that is, and gives what the CPU's attention gives."""

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    query, key = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    layer, bounds = SimpleNamespace(is_causal=True), torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    expected, _ = attention.packed_attention(layer, query, key, key, None, 0.3, bounds, 6)
    monkeypatch.setattr(attention, "varlen_attn", two_gpus.fp32_attention)
    found, _ = attention.packed_attention(layer, query.as_subclass(OnGpu), key, key, None, 0.3, bounds, 6)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)


def test_merge_speed(bench, started, tmp_path):
    out = bench("merge_speed", tmp_path / "merge", "--tiny", "--rank", 2)
    assert re.search(rf"^merge and proof: {NUMBER} s, {NUMBER} GB/s\nratio {NUMBER}$", out, re.MULTILINE)
    assert out.endswith("peak anonymous memory 0.50 GiB, with mapped files 0.75 GiB\n")
    assert json.loads((tmp_path / "merge/merged/config.json").read_text())["text_config"]["hidden_size"] == 256


def test_loop_24b(started, tmp_path):
    """The script's commands, as bash makes them, are run one after the other."""
    recorder, log = tmp_path / "bin/python3", tmp_path / "commands"
    recorder.parent.mkdir()
    recorder.write_text(f'#!/bin/sh\nfor word in "$@"; do printf "%s\\t" "$word"; done >> {log}\necho >> {log}\n')
    recorder.chmod(0o755)
    path = f"{recorder.parent}:{os.environ['PATH']}"

    def commands(**environment) -> list[list[str]]:
        log.write_text("")
        script = ["bash", ROOT / "bench/loop_24b.sh", tmp_path / "work"]
        subprocess.run(script, env=os.environ | {"PATH": path} | environment, check=True, capture_output=True)
        return [line.rstrip("\t").split("\t") for line in log.read_text().splitlines()]

    full, tiny = commands(), commands(TINY="1")
    assert [words[1] for words in full] == ["bench.random_24b", "bench.make_pages", "train", "predict"]
    assert [("--gpu_memory_gib" in words, "--tf32" in words) for words in full[2:]] == [(True, True), (True, False)]
    for _, module, *words in tiny:
        unstarred = [str(next(tmp_path.glob("work/output/*"))) if word.endswith("/*") else word for word in words]
        assert run_here(module, *unstarred)[0] == 0
    assert len(read_rows(tmp_path / "work/predictions.jsonl")) == 4


def test_soak(bench):
    rounds = bench("soak", "--minutes", 0, "--steps", 1, end="too few rounds to tell")
    assert re.fullmatch(rf"round 1: {NUMBER} MiB, \d+ handles, \d+ threads, {NUMBER} s\n", rounds)


@pytest.mark.parametrize(
    ("memory", "handles", "verdict"),
    [
        ([500.0, 503.0, 510.0, 512.0], [6, 7, 6, 6], None),
        ([500.0, 503.0, 523.0, 540.0], [6, 7, 6, 6], "it grows"),
        ([500.0, 500.0, 500.0, 500.0], [6, 6, 6, 7], "it grows"),
    ],
)
def test_soak_judges(capsys, memory, handles, verdict):
    if verdict is None:
        soak.judge(memory, handles, [2, 2, 2, 2])
        assert capsys.readouterr().out.endswith("memory 501.5 → 511.0 MiB (medians of the halves), handles 6 to 7, "
                                                "threads 2 to 2\nflat\n")  # fmt: skip
    else:
        with pytest.raises(SystemExit, match=verdict):
            soak.judge(memory, handles, [2, 2, 2, 2])


def test_busy_machine(bench, started):
    out = bench("busy_machine", "as-it-is", "OMP_NUM_THREADS=1", "--loops", 1, "--steps", 2, "--rows", 2)
    figures = rf"{NUMBER} tokens/s +{NUMBER} rows/s"
    assert re.fullmatch(rf"1 busy loops: +{figures}  as-it-is\n1 busy loops: +{figures}  OMP_NUM_THREADS=1\n", out)


def test_score_million(bench, tmp_path):
    out = bench("score_million", tmp_path / "p.jsonl", "--rows", 200, "--normalize", "case")
    assert out.startswith("Accuracy = ")
    assert re.search(r"\n200 rows, 0 MiB: [\d.]+ s, \d+ MiB\n$", out)


def test_review_speed(bench, tmp_path):
    out = bench("review_speed", tmp_path / "p.jsonl", "--rows", 200)
    assert re.search(r"^filter: a field's value +\d+ ms +40 rows$", out, re.MULTILINE)
    assert re.search(r"^search: all rows +\d+ ms +200 rows$", out, re.MULTILINE)
    assert re.search(r"^memory +\d+ MiB, of it \d+ MiB not of files$", out, re.MULTILINE)


def test_validate_speed(bench, tmp_path):
    out = bench("validate_speed", tmp_path / "v", "--rows", 50, "--pages", 2, "--model_id", TINY)
    assert re.search(r"^50 text records: [\d.]+ s, [\d,]+ a minute, \d+ MiB\n2 pages: ", out, re.MULTILINE)
    assert re.search(r"^2 PDFs: [\d.]+ s, ", out, re.MULTILINE)


@pytest.mark.slow
def test_hostile_pdfs(bench, tmp_path):
    out = bench("hostile_pdfs", tmp_path / "h", "--count", 3, "--pdf_seconds", 0.3, "--at_once", 1)
    for step in ("validate", "predict"):
        assert re.search(
            rf"^{step}: \d+ s, exit code 1, peak [\d,]+ MiB, 3 lines:\n +\d drawing it takes more", out, re.MULTILINE
        )
    assert re.search(
        r"^server: 3 hostile pages, 1 at a time, peak [\d,]+ MiB; a good page takes [\d.]+ s alone", out, re.MULTILINE
    )


def test_a_step_of_its_own(tmp_path, capsys):
    """What `started` stands in for: lines, exit code and memory of a process, and its end after some seconds."""
    (tmp_path / "p.jsonl").write_text('{"messages": [], "expected": "A", "actual": "A"}\n')
    done = steps.run("score", tmp_path / "p.jsonl")
    assert (done.code, done.lines[0][:14]) == (0, "Accuracy = 1/1")
    assert 0.005 < done.own_gib < done.resident_gib < 1
    assert re.match(r"\[ *\d+\.\d s, +\d\.\d GiB\] Accuracy = 1/1", capsys.readouterr().out)
    failed = steps.run("score", tmp_path / "nothing.jsonl", shown=False)
    assert (failed.code, failed.lines) == (2, [f"error: {tmp_path / 'nothing.jsonl'}: no such file"])
    assert capsys.readouterr().out == f"error: {tmp_path / 'nothing.jsonl'}: no such file\n"
    assert steps.run("http.server", 0, seconds=0.5).code == -9


def test_nothing_that_a_bench_reads_is_missing_without_a_word(monkeypatch, tmp_path):
    lines = [
        "Peak GPU memory 75.3 GiB (by process: 75.1, 75.3)",
        "Adapter saved in output/a",
        "Adapter saved in output/b",
    ]
    assert steps.run_folder(lines) == Path("output/b")
    assert steps.peak_memory([]) == "0.0 GiB"
    monkeypatch.setattr(gpu, "on_gpu", lambda: True)
    assert steps.peak_memory(lines) == "75.3 GiB (by process: 75.1, 75.3)"
    with pytest.raises(SystemExit, match="no line like 'Peak GPU memory"):
        steps.peak_memory(["Highest GPU memory 75.3 GiB"])
    with pytest.raises(SystemExit, match="no line like 'Adapter saved in"):
        steps.run_folder(["Adapter in output/a"])
    log = [{"tokens_per_second": 1.0}, {"tokens_per_second": 100.0}, {"loss": 1.0}, {"tokens_per_second": 300.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert steps.tokens_per_second(tmp_path) == 150.0
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log[:1]}))
    with pytest.raises(SystemExit, match="fewer than two logs with tokens_per_second"):
        steps.tokens_per_second(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(bench, script):
    assert f"usage: {script}.py" in bench(script, "--help", end="0")


def documented() -> list[tuple[str, str]]:
    """Script and arguments of each `python -m bench.… …` in the documents and in the scripts' own."""
    paths = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    return sorted(set(re.findall(r"python -m bench\.(\w+) ?([^`\n]*)", text.replace("\\\n", " "))))


@pytest.mark.parametrize(("script", "arguments"), documented())
def test_documented_commands_parse(script, arguments):
    assert script in SCRIPTS
    words = shlex.split(re.sub(r"[][…]|flags of score", " ", arguments))
    if words:  # else the document names the script only
        sys.argv = [f"{script}.py", *words]
        parsed = importlib.import_module(f"bench.{script}").parse_arguments()
        if more := getattr(parsed, "more", None):
            TrainParser((ModelArguments, FinetuneArguments)).parse(more)


@pytest.mark.slow
def test_merge_speed_as_a_user_runs_it(tmp_path):
    words = ["bench.merge_speed", str(tmp_path / "work"), "--tiny"]
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_loop_24b_as_a_user_runs_it(tmp_path):
    environment = os.environ | {"TINY": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = ["bash", ROOT / "bench/loop_24b.sh", tmp_path / "work"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read_rows(tmp_path / "work/predictions.jsonl")) == 4
