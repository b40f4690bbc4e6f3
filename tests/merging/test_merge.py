"""Merged folders: the base's own key names, files and types, proven; whole or not there at all."""

import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from mistral_ft import files
from mistral_ft.data.prompt.encoder import PromptEncoder
from mistral_ft.merging import merge as merging
from mistral_ft.merging.shards import Shard, Span, read_checkpoint
from mistral_ft.model.adapter import Adapter
from mistral_ft.model.loading import load_base
from tests.conftest import ROOT, TINY
from tests.helpers.adapters import VARIANTS, make_adapter, read_weights

CPU = torch.device("cpu")
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def run(pages, train_tiny):
    return train_tiny(pages / "train.jsonl", "--max_steps", 2, "--vision_lora", "True", "--train_projector", "True")


@pytest.fixture
def adapter(tmp_path) -> Path:
    return make_adapter(tmp_path / "adapter")


@pytest.fixture
def base(tmp_path) -> Path:
    """A copy of the embedded base, to be broken."""
    return Path(shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture
def fails(run_cli, tmp_path):
    """Merge, which must fail as a user's mistake does and leave nothing; returns the line."""

    def fails(*arguments) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, out, err = run_cli("merge_lora_weights", *arguments)
        lines = [line for line in err.splitlines() if not line.startswith("merging: ")]
        assert (code, out) == (2, ""), err
        assert len(lines) == 1, err
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0].removeprefix("error: ")

    return fails


def name_base(adapter: Path, base: Path | str) -> Path:
    """Make an adapter name another base."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return adapter


def write_other_layout(folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """The embedded base's weights under the newer key names, in one file."""
    names = {"language_model.model.": "model.language_model.", "language_model.lm_head": "lm_head"}
    weights = {}
    for key, tensor in read_weights(TINY).items():
        old = next((old for old in names if key.startswith(old)), None)
        weights[names[old] + key.removeprefix(old) if old else f"model.{key}"] = tensor.to(dtype)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


# -- What is written ---------------------------------------------------------------------------------------------------


def test_merged_folder_loads_without_peft_and_is_the_base_plus_the_adapter(run, run_cli, tmp_path):
    code, out, _ = run_cli("merge_lora_weights", run, tmp_path / "merged")
    assert code == 0
    assert out == (
        f"Merged 59 of 81 tensors of {TINY} into {tmp_path / 'merged'}\n"
        "Proven by reading it again: each of the adapter's 118 tensors is used once; 59 tensors equal base + adapter "
        "in every bit (59 differ from the base), the other 22 equal the base; config, index, tokenizer and page "
        "settings load\n"
    )

    base, merged = read_weights(TINY), read_weights(tmp_path / "merged")
    assert merged.keys() == base.keys()
    assert {t.dtype for t in merged.values()} == {torch.bfloat16}
    assert sum(not torch.equal(merged[key], base[key]) for key in base) == 59
    assert (tmp_path / "merged" / INDEX).read_bytes() == (TINY / INDEX).read_bytes()
    assert (tmp_path / "merged/config.json").read_bytes() == (TINY / "config.json").read_bytes()

    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    in_memory = load_base(TINY, CPU)
    Adapter(run).merge_into(in_memory, torch.bfloat16)
    for name, tensor in in_memory.state_dict().items():
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_pefts_own_merge_in_fp32_cast_once(variant, run_cli, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", **VARIANTS[variant])
    assert run_cli("merge_lora_weights", adapter, tmp_path / "merged")[0] == 0
    expected = PeftModel.from_pretrained(load_base(TINY, CPU), adapter).merge_and_unload().state_dict()
    merged = load_base(tmp_path / "merged", CPU).state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert torch.equal(tensor, expected[name].bfloat16().float()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_newer_key_names_a_single_file_and_other_types(dtype, base, run_cli, tmp_path):
    write_other_layout(base, dtype)
    adapter = make_adapter(tmp_path / "adapter", base)
    code, _, err = run_cli("merge_lora_weights", adapter, tmp_path / "merged")
    assert code == 0, err
    written = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {dtype}
    expected = PeftModel.from_pretrained(load_base(base, CPU), adapter).merge_and_unload().state_dict()
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert torch.equal(tensor, expected[name].to(dtype)), name


def test_a_bf16_adapter_is_merged_in_fp32(adapter, run_cli, tmp_path):
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    assert run_cli("merge_lora_weights", adapter, tmp_path / "merged")[0] == 0
    expected = PeftModel.from_pretrained(load_base(TINY, CPU), adapter).merge_and_unload().state_dict()
    for name, tensor in load_base(tmp_path / "merged", CPU).state_dict().items():
        assert torch.equal(tensor, expected[name].bfloat16().float()), name


def test_all_but_the_changed_tensors_is_the_bases_file_byte_for_byte(adapter, run_cli, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "BLOCK_BYTES", 4096)  # several blocks to a tensor
    monkeypatch.setattr(merging, "WRITE_BYTES", 1000)
    assert run_cli("merge_lora_weights", adapter, tmp_path / "merged")[0] == 0
    changed = 0
    for shard in read_checkpoint(TINY):
        old, new = shard.path.read_bytes(), (tmp_path / "merged" / shard.path.name).read_bytes()
        assert len(new) == len(old) == shard.size
        assert new[: len(shard.header)] == old[: len(shard.header)]
        for key, span in shard.tensors.items():
            same = new[span.start : span.start + span.size] == old[span.start : span.start + span.size]
            changed += not same
            assert same == (not key.startswith("language_model.model.layers.") or "norm" in key), key
    assert changed == 28


def test_an_adapter_that_changes_nothing_says_so(adapter, run_cli, tmp_path):
    path = adapter / "adapter_model.safetensors"
    save_file({name: t * 0 if "lora_B" in name else t for name, t in load_file(path).items()}, path)
    code, out, _ = run_cli("merge_lora_weights", adapter, tmp_path / "merged")
    assert code == 0
    assert "28 tensors equal base + adapter in every bit (0 differ from the base)" in out


def test_merged_tokenizer_gives_the_encoders_ids(run, run_cli, tmp_path):
    run_cli("merge_lora_weights", run, tmp_path / "merged")
    messages = [{"role": "user", "content": "'The' title?"}]
    expected = PromptEncoder.from_folder(run).encode(messages)[0]
    (tmp_path / "merged/tekken.json").unlink()  # else AutoTokenizer takes mistral-common's, where it is installed
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False) == expected
    assert tokenizer.convert_tokens_to_ids("</s>") == tokenizer.eos_token_id == 2
    assert not list((tmp_path / "merged").glob("chat_template.json"))


def test_files_are_readable_by_others_and_no_code_is_copied(adapter, run_cli, tmp_path):
    run_cli("merge_lora_weights", adapter, tmp_path / "merged")
    for path in (tmp_path / "merged").iterdir():
        assert path.stat().st_mode & stat.S_IROTH, path
        assert path.suffix != ".py"


def test_a_name_is_looked_for_in_output(run, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_cli("merge_lora_weights", run.name, "merged")[0] == 0
    code, _, err = run_cli("merge_lora_weights", "no-such-run", "other")
    assert code == 2
    assert err == "error: no-such-run: no such adapter folder, and none in output/\n"


# -- The proof ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "should"),
    [
        ("language_model.model.embed_tokens.weight", "the base's"),
        ("language_model.model.layers.1.mlp.up_proj.weight", "the base's with the adapter's change"),
    ],
)
def test_one_wrong_bit_on_the_disk_is_found(key, should, adapter, fails, tmp_path, monkeypatch):
    write = merging.write_tensor

    def write_wrongly(shard, target, written_key, update):
        write(shard, target, written_key, update)
        if written_key == key:
            with open(target, "r+b") as file:
                file.seek(shard.tensors[key].start + shard.tensors[key].size - 1)
                last = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([last ^ 1]))

    monkeypatch.setattr(merging, "write_tensor", write_wrongly)
    assert f"{key}, read again, is not {should}: are disk and memory sound?" in fails(adapter, tmp_path / "merged")


def test_where_tensors_lie_in_a_file(tmp_path):
    tensors = {"b": torch.arange(6, dtype=torch.float32).reshape(2, 3), "a": torch.ones(4, dtype=torch.bfloat16)}
    save_file(tensors | {"c": torch.tensor(7, dtype=torch.int8)}, tmp_path / "x.safetensors", {"format": "pt"})
    shard = Shard.read(tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    assert list(shard.tensors) == ["b", "a", "c"]
    start = len(shard.header)
    assert shard.tensors == {
        "b": Span(start, 24, "F32", (2, 3)),
        "a": Span(start + 24, 8, "BF16", (4,)),
        "c": Span(start + 32, 1, "I8", ()),
    }
    assert data[start : start + 24] == tensors["b"].numpy().tobytes()
    assert shard.size == len(data) == start + 33


def test_tensors_without_rows_are_copied_too(tmp_path):
    save_file({"scalar": torch.tensor(7.5), "empty": torch.zeros(0, 4)}, tmp_path / "x.safetensors")
    (tmp_path / "out").mkdir()
    assert merging.merge_weights([Shard.read(tmp_path / "x.safetensors")], tmp_path / "out", {}) == 0
    assert (tmp_path / "out/x.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


# -- What cannot be merged ---------------------------------------------------------------------------------------------


def test_an_output_folder_with_something_in_it_is_refused(adapter, fails, tmp_path, monkeypatch):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/mine.txt").write_text("keep")
    line = fails(adapter, tmp_path / "merged")
    assert line == f"{tmp_path / 'merged'}: exists and is not an empty folder; give a new one"
    assert "exists and is not an empty folder" in fails(adapter, tmp_path / "merged/mine.txt")
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    assert "is where a disk is mounted and cannot be replaced" in fails(adapter, tmp_path / "volume")


def test_a_base_without_one_of_the_layers_is_refused(adapter, base, fails, tmp_path):
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    index = json.loads((base / INDEX).read_text())
    shard = base / index["weight_map"].pop(key)
    name_base(adapter, base)
    (base / INDEX).write_text(json.dumps(index))
    assert f"{INDEX} names other tensors for {shard.name} than it holds" in fails(adapter, tmp_path / "merged")
    weights = load_file(shard)
    del weights[key]
    save_file(weights, shard)
    line = fails(adapter, tmp_path / "merged")
    assert line == (
        f"{base}: has no tensor for the adapter's model.language_model.layers.1.mlp.up_proj.weight; "
        "is it another model's?"
    )


def test_an_adapter_of_another_base_is_refused(adapter, fails, tmp_path):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({n: torch.ones(4, 999) if "q_proj.lora_A" in n else t for n, t in weights.items()}, path)
    assert "is (256, 999) here but (256, 256) in the base; is it another model's?" in fails(adapter, tmp_path / "m")
    save_file({name.replace("layers.2", "layers.39"): t for name, t in weights.items()}, path)
    assert f"{TINY}: has no tensor for the adapter's model.language_model.layers.39." in fails(adapter, tmp_path / "m")


def test_an_adapter_with_an_unknown_tensor_is_refused(adapter, fails, tmp_path):
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.lm_head.weight": torch.ones(2, 2)}, path)
    line = fails(adapter, tmp_path / "merged")
    assert line == f"{path}: holds base_model.model.lm_head.weight, which is no part of an adapter that can be merged"


def test_missing_and_cut_shards_are_refused(adapter, base, fails, tmp_path):
    name_base(adapter, base)
    data = (base / SHARD).read_bytes()
    for length in (0, 5, 1000, len(data) - 1):
        (base / SHARD).write_bytes(data[:length])
        assert f"{base / SHARD}: broken file: " in fails(adapter, tmp_path / "merged")
    (base / SHARD).unlink()
    assert fails(adapter, tmp_path / "merged") == f"{base}: 1 weight files are missing, such as {SHARD}"
    (base / INDEX).write_text('{"weight_map": {}}')
    assert fails(adapter, tmp_path / "merged") == f"{base / INDEX}: broken: no weight_map"
    (base / INDEX).unlink()
    assert fails(adapter, tmp_path / "merged") == f"{base}: has neither {INDEX} nor model.safetensors"


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "tokenizer.json"])
def test_a_base_with_a_broken_file_is_refused(name, adapter, base, fails, tmp_path):
    name_base(adapter, base)
    (base / name).write_text("{")
    assert f"{name}: broken" in fails(adapter, tmp_path / "merged")


def test_a_base_with_another_tokenizer_is_refused(run, run_cli, tmp_path):
    made = json.loads((run / "run.json").read_text())
    made["prompt"]["tokenizer_sha256"] = "0" * 64
    (run / "run.json").write_text(json.dumps(made))
    code, _, err = run_cli("merge_lora_weights", run, tmp_path / "merged")
    assert code == 2
    assert err.endswith(f"error: {TINY}: its tokenizer is not the one that {run} was trained with\n")
    assert not (tmp_path / "merged").exists()


# -- Quantized bases ---------------------------------------------------------------------------------------------------


def test_quantized_bases_are_refused(adapter, base, fails, tmp_path):
    name_base(adapter, base)
    config = json.loads((base / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(quantized))
    line = fails(adapter, tmp_path / "merged")
    assert line == (
        f"{base}: its weights are quantized (bitsandbytes); give the bf16 model they are from: --base_model"
    )
    (base / "config.json").write_text(json.dumps(config))
    weights = load_file(base / SHARD)
    key = next(key for key in weights if "up_proj" in key and "language" in key)
    save_file(weights | {key: weights[key].to(torch.float8_e4m3fn)}, base / SHARD)
    assert f"{base}: {key} is stored as F8_E4M3; merge onto the bf16 model" in fails(adapter, tmp_path / "merged")


@pytest.mark.parametrize(
    ("trained_on", "note"),
    [
        ("someone/Mistral-Small-3.1-24B-Instruct-2503-bnb-4bit", "(4-bit) and has learned to make up for that model's"),
        ("someone/Mistral-Small", f"Merging onto {TINY}; the adapter was trained on someone/Mistral-Small\n"),
    ],
)
def test_merging_onto_another_base_than_the_one_named(trained_on, note, adapter, run_cli, tmp_path):
    name_base(adapter, trained_on)
    code, out, _ = run_cli("merge_lora_weights", adapter, tmp_path / "merged", "--base_model", TINY)
    assert code == 0
    assert note in out
    assert f"Merged 28 of 81 tensors of {TINY} into " in out


# -- Killed, interrupted, disk full ------------------------------------------------------------------------------------


def test_an_interrupt_leaves_nothing_behind(adapter, run_cli, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())

    def stop(base, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "copy_other_files", stop)
    code, _, err = run_cli("merge_lora_weights", adapter, tmp_path / "merged")
    assert code == 130
    assert err.endswith("error: interrupted\n")
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupt_does_not_wait_for_all_tensors(adapter, run_cli, tmp_path, monkeypatch):
    written = []

    def write_slowly(shard, target, key, update):
        written.append(key)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(0.05)

    monkeypatch.setattr(merging, "write_tensor", write_slowly)
    monkeypatch.setattr(merging, "prove_tensor", lambda *args: True)
    monkeypatch.setattr(merging, "MAX_THREADS", 2)
    threads = torch.get_num_threads()
    assert run_cli("merge_lora_weights", adapter, tmp_path / "merged")[0] == 130
    assert len(written) < 20
    assert not (tmp_path / "merged").exists()
    assert torch.get_num_threads() == threads


# Runs one merge after another in forks of itself, each killed at another of its operations on files.
KILLED = """
import os, signal, sys
import merge_lora_weights, transformers
import mistral_ft.model.adapter, mistral_ft.merging.merge, mistral_ft.model.card, mistral_ft.merging.upload
from mistral_ft.cli import run_step
from transformers import AutoConfig
from huggingface_hub import ModelCardData

adapter, parent, shots = sys.argv[1:]
sys.argv = ["merge_lora_weights", adapter, os.path.join(parent, "merged")]

def merge(kill_at):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    seen = 0
    def watch(event, args):
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.chmod", "os.truncate", "os.remove") and parent in str(args):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        run_step(merge_lora_weights.main)
    finally:
        if not kill_at:
            with open(os.path.join(os.path.dirname(adapter), "count"), "w") as file:
                file.write(str(seen))
        os._exit(0)

merge(0)
count = int(open(os.path.join(os.path.dirname(adapter), "count")).read())
import shutil
shutil.rmtree(os.path.join(parent, "merged"))
for shot in range(1, int(shots) + 1):
    status = merge(count * shot // (int(shots) + 1))
    print(status, *os.listdir(parent), flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_point_it_leaves_no_folder_and_a_rerun_starts_clean(adapter, run_cli, tmp_path):
    parent = tmp_path / "out"
    parent.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, adapter, parent, "12"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 12, done.stdout + done.stderr
    for line in lines:
        status, *left = line.split()
        assert int(status) == signal.SIGKILL
        assert len(left) == 1, line  # what the kill before this one left is gone
        assert left[0].startswith(".merged.")
        assert left[0].endswith(".tmp")
    assert run_cli("merge_lora_weights", adapter, parent / "merged")[0] == 0
    assert [path.name for path in parent.iterdir()] == ["merged"]


def test_what_a_living_merge_works_on_is_left_alone(adapter, run_cli, tmp_path):
    dead, alive = tmp_path / ".merged.dead.tmp", tmp_path / ".merged.alive.tmp"
    dead.mkdir()
    alive.mkdir()
    with files._lock(alive) as held:
        assert held
        assert run_cli("merge_lora_weights", adapter, tmp_path / "merged")[0] == 0
    assert not dead.exists()
    assert alive.exists()


def test_disk_space_is_checked_first(adapter, fails, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 3_000_000))
    monkeypatch.setattr(merging, "merge_weights", lambda *args: pytest.fail("went on"))
    line = fails(adapter, tmp_path / "merged")
    assert line == f"{tmp_path}: 0.0 GB are needed there, but its disk has 0.0 GB free"


def test_a_disk_that_takes_no_more(adapter, fails, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        line = fails(adapter, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line == f"{tmp_path / 'merged'}: cannot be written, nothing was kept: File too large"


@pytest.mark.slow
def test_a_full_disk(adapter, tmp_path):
    """A file system in memory that holds less than the model; only root may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    try:
        command = [sys.executable, "-m", "merge_lora_weights", adapter, disk / "merged"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        assert "GB are needed there, but its disk has 0.0 GB free" in done.stderr
        code = "import shutil; shutil.disk_usage = lambda p: shutil._ntuple_diskusage(9, 9, 1 << 40)\n"
        code += "import merge_lora_weights as m; m.run_step(m.main)"
        done = subprocess.run([sys.executable, "-c", code, *command[3:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2
        line = done.stderr.splitlines()[-1]
        assert line == f"error: {disk / 'merged'}: cannot be written, nothing was kept: No space left on device"
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)
