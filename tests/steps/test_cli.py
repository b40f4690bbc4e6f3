"""The command lines as users meet them: help, mistakes, and the commands that the documents promise."""

import functools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mistral_ft.cli import run_step
from mistral_ft.errors import UserError
from tests.conftest import ROOT, TINY, read_rows, row, write_jsonl

STEPS = ["train", "predict", "score", "merge_lora_weights", "server", "validate_data", "reformat_data", "train_status"]


@pytest.mark.parametrize("step", STEPS)
def test_help_starts_without_torch(step):
    code = (
        f"import runpy, sys; sys.argv = ['{step}.py', '--help']\n"
        f"try: runpy.run_module('{step}', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert f"python -m {step}" in done.stdout


def fails(run_cli, *command) -> str:
    """Run a command that must fail as a user's mistake does; return its one line."""
    code, out, err = run_cli(*command)
    lines = [line for line in err.splitlines() if ": page " not in line]
    assert code == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in out + err
    return lines[0].removeprefix("error: ")


@pytest.fixture
def train(run_cli, pages, tmp_path):
    def train(*arguments, dataset=pages / "train.jsonl", model=TINY, output=tmp_path / "output"):
        line = fails(run_cli, "train", "--model_id", model, "--dataset", dataset, "--output_dir", output, *arguments)
        assert not output.exists() or not any(output.iterdir())
        return line

    return train


def test_unknown_arguments(train):
    assert train("--lora_rang", 3) == (
        "unknown arguments: --lora_rang 3 (did you mean lora_rank?) (see python -m train --help)"
    )
    assert "--warmup_ratio is gone from transformers: write --warmup_steps" in train("--warmup_ratio", 0.03)
    assert "argument --lora_rank/--lora-rank: invalid int value: 'x'" in train("--lora_rank", "x")


def test_all_argument_problems_come_at_once(train):
    line = train("--lora_rank", 0, "--vision_lr", "1e-5")
    assert "--lora_rank 0: must be at least 1; --vision_lr has no effect" in line


def test_bad_pages_stop_training_before_the_weights_are_loaded(train, pages):
    data = (pages / "1.png").read_bytes()
    (pages / "1.png").write_bytes(data[: len(data) // 2])
    assert f"{pages / 'train.jsonl'}:2: image {pages / '1.png'} cannot be opened: " in train()
    (pages / "1.png").unlink()
    assert f"{pages / 'train.jsonl'}:2: image {pages / '1.png'} does not exist" in train()


def test_bad_data_files(train, pages):
    assert f"{pages}: is a folder; expected a JSONL file in it" in train(dataset=pages)
    assert "nowhere.jsonl: no such file" in train(dataset=pages / "nowhere.jsonl")
    (pages / "empty.jsonl").write_text("")
    assert "empty.jsonl: holds no record" in train(dataset=pages / "empty.jsonl")
    (pages / "cut.jsonl").write_text((pages / "train.jsonl").read_text()[:300])
    assert "cut.jsonl:2: the line ends in the middle of the record" in train(dataset=pages / "cut.jsonl")


def test_vision_flags_without_a_page(train, pages):
    rows = [r for r in read_rows(pages / "train.jsonl") if "Paris" in str(r)]
    line = train("--vision_lora", "True", dataset=write_jsonl(pages / "text.jsonl", rows))
    assert line == "--vision_lora and --train_projector have no effect: no record has an image"


def test_what_bitsandbytes_says_of_its_kernels_is_not_for_our_users():
    """On CPUs with AVX512-BF16 it warns while transformers imports it, in every step that loads torch."""
    code = (
        "import logging; from mistral_ft.cli import run_step\n"
        "run_step(lambda: logging.getLogger('bitsandbytes.backends.cpu.ops').warning('Failed to load'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_base_is_not_sharded_over_one_process(train):
    assert train("--shard_base", True) == (
        "--shard_base True needs several processes: start them with torchrun --nproc_per_node"
    )


def test_a_page_that_breaks_while_a_worker_reads_it(run_cli, pages, tmp_path, monkeypatch):
    from mistral_ft.training import callbacks

    begin = callbacks.ProgressCallback.on_train_begin

    def break_page(self, *args, **kwargs):
        (pages / "3.png").unlink()
        begin(self, *args, **kwargs)

    monkeypatch.setattr(callbacks.ProgressCallback, "on_train_begin", break_page)
    line = fails(
        run_cli, "train", "--model_id", TINY, "--dataset", pages / "train.jsonl", "--output_dir", tmp_path / "output",
        "--dataloader_num_workers", 1, "--per_device_train_batch_size", 8, "--max_steps", 3,
    )  # fmt: skip
    assert line == f"{pages / 'train.jsonl'}:4: image {pages / '3.png'} does not exist"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "a.jsonl:1: image b\u2028c\x1b[2J\x9b\u202e.png is gone",
            r"a.jsonl:1: image b c\x1b[2J\x9b\u202e.png is gone",
        ),
        ("a\nb \x0c\x85 c\r\n", "a b c"),
        ("half \udcff", r"half \udcff"),
        ("Caught in worker.\nTraceback:\nmistral_ft.errors.RecordError: a:1: b\u2028c", "a:1: b c"),
    ],
)
def test_an_error_is_one_line_that_acts_on_no_terminal(capsys, text, line):
    def fail():
        raise UserError(text)

    with pytest.raises(SystemExit):
        run_step(fail)
    assert capsys.readouterr().err == f"error: {line}\n"


def test_termination_is_cleaned_up_after_like_an_interrupt(run_cli, pages, tmp_path, monkeypatch):
    from mistral_ft.training import preflight

    monkeypatch.setattr(preflight, "pack", lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = run_cli(
        "train", "--model_id", TINY, "--dataset", pages / "train.jsonl", "--output_dir", tmp_path / "output",
        "--packing", True,
    )  # fmt: skip
    assert code == 130
    assert err.endswith("error: terminated\n")
    assert not any((tmp_path / "output").iterdir())


def test_records_that_are_too_long(train):
    assert "are more than --max_seq_length 20; raise it" in train("--max_seq_length", 20)


def test_models_that_are_none(train, tmp_path):
    assert "no such folder, and no hub id such as" in train(model="./output/nothing")
    (tmp_path / "empty").mkdir()
    assert "config.json: missing, so" in train(model=tmp_path / "empty")
    assert "not in the hub's local cache, and HF_HUB_OFFLINE is set" in train(model="nobody/no-such-model")


def test_a_folder_that_cannot_be_written(run_cli, pages, tmp_path):
    (tmp_path / "file").write_text("")
    line = fails(
        run_cli, "train", "--model_id", TINY, "--dataset", pages / "train.jsonl", "--output_dir", tmp_path / "file"
    )
    assert line.startswith(f"{tmp_path / 'file'}")
    assert line.endswith("Not a directory") or line.endswith("File exists")


def test_resuming_from_nothing(train, tmp_path):
    assert "holds no complete checkpoint to resume from" in train("--resume_from_checkpoint", tmp_path)


def test_a_run_that_dies_at_once_leaves_no_folder(run_cli, pages, tmp_path, monkeypatch):
    from mistral_ft.training import trainer as training

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.FinetuneTrainer, "training_step", stop)
    code, _, err = run_cli(
        "train", "--model_id", TINY, "--dataset", pages / "train.jsonl", "--output_dir", tmp_path / "output"
    )
    assert code == 130
    assert err.endswith("error: interrupted\n")
    assert not any((tmp_path / "output").iterdir())


def test_predict_on_what_is_no_model(run_cli, pages, tmp_path):
    data = pages / "train.jsonl"
    (tmp_path / "empty").mkdir()
    line = fails(run_cli, "predict", data, tmp_path / "empty")
    assert "holds neither adapter_config.json nor config.json; did its training finish?" in line
    assert "--batch_size 0: must be at least 1" in fails(run_cli, "predict", data, TINY, "--batch_size", 0)
    assert "the following arguments are required: model" in fails(run_cli, "predict", data)
    line = fails(run_cli, "predict", data, TINY, "-o", tmp_path / "nowhere" / "out.jsonl")
    assert line == f"{tmp_path / 'nowhere'}: no such folder to write out.jsonl into"
    assert f"{tmp_path}: is a folder; give a file" in fails(run_cli, "predict", data, TINY, "-o", tmp_path)


class GatedHub(BaseHTTPRequestHandler):
    """Answers as the hub does for a gated model and a caller without a token."""

    def do_GET(self):
        body = json.dumps({"error": "Access to model x/y is restricted. You must be authenticated"}).encode()
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


def test_a_gated_model_without_a_token(pages, tmp_path):
    hub = HTTPServer(("127.0.0.1", 0), GatedHub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-m", "train", "--dataset", pages / "train.jsonl", "--output_dir", tmp_path / "output"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    hub.shutdown()
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "error: mistralai/Mistral-Small-3.1-24B-Instruct-2503 is gated: accept its terms on "
        "https://huggingface.co/mistralai/Mistral-Small-3.1-24B-Instruct-2503, then set HF_TOKEN to a token of that "
        "account (none is set)"
    )
    assert "Traceback" not in done.stderr
    assert not any((tmp_path / "output").iterdir())


def documented_commands() -> list[tuple[str, str]]:
    """Step and arguments of each command in the documents and in the steps' own, those of several processes too."""
    paths = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*.py")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(path.read_text(encoding="utf-8") for path in paths))
    launcher = r"(?:^|(?<=[`\s]))(?:python|(?:torchrun|accelerate launch)[^`\n]*?)"
    return sorted(set(re.findall(rf"{launcher} -m ({'|'.join(STEPS)})\b([^`\n#(]*)", text, re.MULTILINE)))


@functools.cache
def known_flags(step: str) -> set[str]:
    done = subprocess.run([sys.executable, "-m", step, "--help"], cwd=ROOT, capture_output=True, text=True)
    known = set(re.findall(r"(?:^|[ ,|])(--?\w+)", done.stdout))
    if step == "train":
        from mistral_ft.training.training_arguments import FinetuneArguments

        known |= {f"--{name}" for name in FinetuneArguments.__dataclass_fields__}
    return known


@pytest.mark.parametrize(("step", "arguments"), documented_commands())
def test_documented_commands_parse(step, arguments):
    """Every flag that a documented command has is known to its step."""
    words = shlex.split(re.sub(r"\[|\]|…|\.\.\.", " ", arguments))
    assert [word for word in words if word.startswith("-") and word not in known_flags(step)] == []


def test_a_runs_name_is_enough(pages, train_tiny, run_cli, tmp_path, monkeypatch):
    data = pages / "train.jsonl"
    run = train_tiny(data, "--max_steps", 2, "--save_steps", 1)
    monkeypatch.chdir(tmp_path)
    assert run.parent.name == "output"
    (tmp_path / run.name).mkdir()  # one of the same name that is nothing of the kind
    assert run_cli("train_status", run.name)[1].startswith("done, step 2/2, ")
    code, out, err = run_cli("predict", data, run.name, "--limit", 1)
    assert (code, out.splitlines()[0]) == (0, f"1 rows in {run.name}.jsonl, 0 with an error"), err
    assert run_cli("predict", data, f"{run.name}/checkpoint-1", "--limit", 1)[1].startswith(
        f"1 rows in {run.name}-checkpoint-1.jsonl"
    )
    code, out, _ = run_cli("validate_data", data, "--model_id", run.name)
    assert code == 0
    assert "tokens" in out
    command = ("train", "--model_id", TINY, "--dataset", data, "--learning_rate", "2e-3", "--lora_dropout", "0")
    command += ("--max_steps", 2, "--save_steps", 1, "--resume_from_checkpoint", run.name)
    code, out, err = run_cli(*command, "--output_dir", tmp_path / "output")
    assert code == 0, err
    assert out.splitlines()[-1] == f"Adapter saved in {run}"
    code, _, err = run_cli(*command, "--output_dir", tmp_path / "elsewhere")
    assert code == 2
    assert err.startswith(f"error: {run.name}: holds no complete checkpoint to resume from")
    assert run_cli("train_status", "no-such-run")[0] == 2


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_closed_outputs_are_no_matter(tmp_path, closed):
    write_jsonl(tmp_path / "p.jsonl", [row(0, "A") | {"actual": "A"}])
    command = f'"{sys.executable}" -m score "{tmp_path}/p.jsonl" {closed}'
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("" if closed == ">&-" else "Accuracy = 1/1")


def test_a_line_is_seen_when_it_is_printed():
    code = "from mistral_ft.cli import run_step; run_step(lambda: print('ready') or input() and None)"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.communicate("go on\n")
