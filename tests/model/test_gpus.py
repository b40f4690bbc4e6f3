"""Machines whose card torch cannot use, or whose card is too small: each ends in its line, and never in the toy.

nvidia-smi is a script on PATH here, /proc and /sys are folders, and torch says what the test has it say.
"""

import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import MistralConfig

from bench.random_24b import config_24b
from mistral_ft.errors import UserError
from mistral_ft.model import device as device_module
from mistral_ft.model import gpus as cards
from mistral_ft.model.device import pick_device
from mistral_ft.model.gpus import Card, check_generation, choose_base, nvidia_cards, other_card, use_gpu
from mistral_ft.model.rounding import FOUR_BITS, FP8
from mistral_ft.model.size import check_size, too_big, weight_bytes
from tests.conftest import ROOT, TINY
from tests.helpers.adapters import make_adapter

A100 = "NVIDIA A100-SXM4-80GB, 81920, 470.57.02"
FOUND = "NVIDIA A100-SXM4-80GB (80.0 GiB, driver 470.57.02) is here"
CPU_BUILD = (
    f"{FOUND}, but torch cannot use it: this torch 2.13.0+cpu is a build for CPUs only; update the driver to 525 or "
    "newer, and reinstall torch"
)
ON_CPU = "to compute on the CPU on purpose, put CUDA_VISIBLE_DEVICES= in front of the command"
SAMPLE = "to run the sample with the embedded base on purpose: base=models/tiny ./run.sh"
CARD, GIB = torch.device("cuda", 0), 2**30


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Make this a machine: machine(what nvidia-smi prints, its exit code, the files of /proc and /sys)."""
    root, path = tmp_path / "root", tmp_path / "path"

    def make(smi: str | None = None, code: int = 0, files: dict[str, str] | None = None, torch_for=None) -> None:
        shutil.rmtree(root, ignore_errors=True)
        for name, text in (files or {}).items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        path.mkdir(exist_ok=True)
        if smi is not None:
            (path / "nvidia-smi").write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{smi}\nEND\nexit {code}\n")
            (path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(path))
        monkeypatch.setattr(cards, "ROOT", root)
        monkeypatch.setattr(cards.platform, "system", lambda: "Linux")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch, "__version__", "2.13.0+cu130" if torch_for else "2.13.0+cpu")
        monkeypatch.setattr(torch.version, "cuda", torch_for)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return make


@pytest.fixture
def gpus(machine, monkeypatch):
    """Make this a machine whose GPUs of such sizes torch can use: gpus(80 * GIB, free=…, share=…)."""

    def make(*sizes: float, free: float | None = None, share: float = 1.0, name: str = "NVIDIA L4") -> None:
        machine(torch_for="13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "compute_120"])
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        properties = [SimpleNamespace(name=name, total_memory=int(size)) for size in sizes]
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: properties[getattr(d, "index", d) or 0])
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free or sizes[0], sizes[0]))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: share)

    return make


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory):
    """The config.json of Mistral-7B v0.3."""
    folder = tmp_path_factory.mktemp("models") / "7b"
    MistralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=32768,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def small_24b(tmp_path_factory):
    """The config.json of Mistral-Small-3.1-24B."""
    folder = tmp_path_factory.mktemp("models") / "24b"
    config_24b().save_pretrained(folder)
    return folder


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    return str(error.value)


PROC = {
    "proc/driver/nvidia/version": (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue Jul 13 16:14:05 UTC 2021\n"
        "GCC version:  gcc version 9.3.0 (Ubuntu 9.3.0-17ubuntu1~20.04)\n"
    ),
    "proc/driver/nvidia/gpus/0000:00:04.0/information": (
        "Model: \t\t NVIDIA A100-SXM4-80GB\nIRQ:   \t\t 35\nBus Type: \t PCIe\n"
    ),
}
ON_PCI = {"sys/bus/pci/devices/0000:00:04.0/vendor": "0x10de\n", "sys/bus/pci/devices/0000:00:04.0/class": "0x030200\n"}
MISMATCH = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 550.54"
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
    "driver is installed and running."
)


@pytest.mark.parametrize(
    ("smi", "code", "files", "found"),
    [
        (None, 0, {}, ([], None)),
        (A100, 0, {}, ([Card("NVIDIA A100-SXM4-80GB", 80.0, "470.57.02")], None)),
        (f"{A100}\n{A100}", 0, PROC, ([Card("NVIDIA A100-SXM4-80GB", 80.0, "470.57.02")] * 2, None)),
        ("NVIDIA GB10, [N/A], 580.95.05", 0, {}, ([Card("NVIDIA GB10", None, "580.95.05")], None)),
        (None, 0, PROC, ([Card("NVIDIA A100-SXM4-80GB", None, "470.57.02")], None)),
        # The tool alone, as in an image that is run without a card.
        (NO_DRIVER, 9, {}, ([], f"nvidia-smi says: {NO_DRIVER[:-1]}")),
        (NO_DRIVER, 9, ON_PCI, ([Card("NVIDIA card")], f"nvidia-smi says: {NO_DRIVER[:-1]}")),
        (
            MISMATCH, 18, PROC,
            (
                [Card("NVIDIA A100-SXM4-80GB", None, "470.57.02")],
                "nvidia-smi says: Failed to initialize NVML: Driver/library version mismatch",
            ),
        ),
    ],
)  # fmt: skip
def test_what_cards_are_found(machine, smi, code, files, found):
    machine(smi, code, files)
    assert nvidia_cards() == found


def test_an_open_kernel_module_names_its_version_too(machine):
    line = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build  (dvs-builder)\n"
    machine(files=PROC | {"proc/driver/nvidia/version": line})
    assert nvidia_cards()[0] == [Card("NVIDIA A100-SXM4-80GB", None, "535.104.05")]


def test_an_nvidia_smi_that_hangs_is_left_behind(machine, tmp_path, monkeypatch):
    machine("", files=PROC)
    (tmp_path / "path/nvidia-smi").write_text("#!/bin/sh\nexec /bin/sleep 600\n")
    monkeypatch.setattr(cards, "SMI_SECONDS", 0.1)
    assert nvidia_cards() == (
        [Card("NVIDIA A100-SXM4-80GB", None, "470.57.02")], "nvidia-smi does not answer within 0.1 s"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("smi", "code", "files", "torch_for", "line"),
    [
        (A100, 0, {}, None, CPU_BUILD),
        (
            "NVIDIA L4, 23034, 550.54.15", 0, {}, None,
            "NVIDIA L4 (22.5 GiB, driver 550.54.15) is here, but torch cannot use it: this torch 2.13.0+cpu is a build "
            "for CPUs only; pip install --force-reinstall torch==2.13.0 --index-url <PyTorch's index for CUDA 12>",
        ),
        (
            A100, 0, {}, "13.0",
            f"{FOUND}, but torch cannot use it: this torch 2.13.0 is made for CUDA 13.0, which needs driver 580 or "
            "newer; update the driver",
        ),
        (
            "NVIDIA L4, 23034, 550.54.15\n" * 4, 0, {}, "13.0",
            "NVIDIA L4 (22.5 GiB, driver 550.54.15) and 3 more are here, but torch cannot use them: this torch 2.13.0 "
            "is made for CUDA 13.0, which needs driver 580 or newer; update the driver, or pip install "
            "--force-reinstall torch==2.13.0 --index-url <PyTorch's index for CUDA 12>",
        ),
        (
            MISMATCH, 18, PROC, "13.0",
            "NVIDIA A100-SXM4-80GB (driver 470.57.02) is here, but torch cannot use it: nvidia-smi says: Failed to "
            "initialize NVML: Driver/library version mismatch; restart the machine, or install the driver again",
        ),
        (
            NO_DRIVER, 9, ON_PCI, "13.0",
            f"NVIDIA card is here, but torch cannot use it: nvidia-smi says: {NO_DRIVER[:-1]}; restart the machine, or "
            "install the driver again",
        ),
        (
            "NVIDIA H100 80GB HBM3, 81559, 580.65.06", 0, {}, "13.0",
            "NVIDIA H100 80GB HBM3 (79.6 GiB, driver 580.65.06) is here, but torch cannot use it: torch says: Error "
            "802: system not yet initialized; see what nvidia-smi shows",
        ),
        (
            None, 0, PROC | {"proc/driver/nvidia/version": "NVRM version: Kernel Module  580.65.06  Sun\n"}, "13.0",
            "NVIDIA A100-SXM4-80GB (driver 580.65.06) is here, but torch cannot use it: torch says: Error 802: system "
            "not yet initialized; in a container, start it with its GPUs (docker run --gpus all)",
        ),
    ],
)  # fmt: skip
def test_a_card_that_torch_cannot_use_stops_with_one_line(machine, monkeypatch, smi, code, files, torch_for, line):
    def fail():
        raise RuntimeError("Error 802: system not yet initialized.\nSee the log.")

    machine(smi, code, files, torch_for)
    monkeypatch.setattr(torch.cuda, "init", fail)
    assert refusal(pick_device) == f"{line}; {ON_CPU}"
    assert pick_device(use_cpu=True).type == "cpu"
    assert refusal(choose_base) == refusal(choose_base, "mistralai/Mistral-Nemo") == f"{line}; {SAMPLE}"
    assert choose_base("models/tiny") == (0, "models/tiny")


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_cards_that_are_hidden_are_the_users_choice(machine, monkeypatch, capsys, hidden):
    machine(A100, torch_for="13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert pick_device().type == "cpu"
    assert choose_base() == (0, "models/tiny")
    assert capsys.readouterr().err == (
        "No GPU to compute on: using the embedded base models/tiny, which reads the sample's print.\n"
    )


def test_a_card_that_does_not_exist_is_named(machine, monkeypatch):
    machine(f"{A100}\n{A100}", torch_for="13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    found = "NVIDIA A100-SXM4-80GB (80.0 GiB, driver 470.57.02) and 1 more are here, numbered from 0"
    assert refusal(use_gpu) == f"CUDA_VISIBLE_DEVICES=7 names no card: {found}; {ON_CPU}"
    machine("NVIDIA H100, 81559, 580.65.06", torch_for="13.0")
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5")
    assert refusal(use_gpu) == (
        "NVIDIA H100 (79.6 GiB, driver 580.65.06) is here, but torch cannot use it: torch finds none; "
        f"CUDA_VISIBLE_DEVICES=GPU-5 may name none of them; {ON_CPU}"
    )


def amd(gib: float) -> dict[str, str]:
    device = "sys/class/drm/renderD128/device"
    return {f"{device}/vendor": "0x1002\n", f"{device}/mem_info_vram_total": f"{int(gib * GIB)}\n"}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, None),
        (amd(24), "This toolkit does not compute on AMD's GPUs, such as the one of 24.0 GiB here"),
        (amd(0.5), None),  # a laptop's graphics
        (ON_PCI, "The NVIDIA card here has no driver"),
        ({name: text.replace("10de", "1a03") for name, text in ON_PCI.items()}, None),
    ],
)
def test_other_cards_are_named_and_the_cpu_is_used(machine, capsys, files, reason):
    machine(files=files)
    assert other_card() == reason
    check_size("tiny", TINY, pick_device())
    assert capsys.readouterr().err == (f"{reason}: using the CPU\n" if reason else "")
    assert choose_base() == (0, "models/tiny")
    line = "using the embedded base models/tiny, which reads the sample's print.\n"
    assert capsys.readouterr().err == f"{reason or 'No GPU to compute on'}: {line}"


def test_apples_gpu_is_named(machine, monkeypatch):
    machine()
    monkeypatch.setattr(cards.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(cards.platform, "machine", lambda: "arm64")
    assert other_card() == "This toolkit does not compute on Apple's GPU"
    monkeypatch.setattr(cards.platform, "machine", lambda: "x86_64")
    assert other_card() is None


def test_a_big_model_on_the_cpu_beside_another_card_is_refused(machine, monkeypatch, run_cli, pages, seven_b):
    machine(files=amd(24))
    reason = "This toolkit does not compute on AMD's GPUs, such as the one of 24.0 GiB here"
    line = f"{reason}, and {seven_b} with its 13.5 GiB of weights is too big for the CPU; {ON_CPU}"
    assert run_cli("predict", pages / "train.jsonl", seven_b) == (2, "", f"error: {line}\n")
    cpu = torch.device("cpu")
    check_size("7b", seven_b, cpu, use_cpu=True)
    check_size("tiny", TINY, cpu)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check_size("7b", seven_b, cpu)
    machine()
    check_size("7b", seven_b, cpu)  # no card is here


def test_a_torch_for_rocm_is_refused(machine, monkeypatch):
    machine(files=amd(64))
    monkeypatch.setattr(torch, "__version__", "2.13.0+rocm7.0")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert refusal(pick_device) == (
        "torch 2.13.0+rocm7.0 is made for AMD's ROCm, on which this toolkit was never run, so its results there are "
        f"unknown; {ON_CPU}"
    )
    machine("NVIDIA L4, 23034, 580.65.06")
    monkeypatch.setattr(torch, "__version__", "2.13.0+rocm7.0")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "but torch cannot use it: this torch 2.13.0+rocm7.0 is made for AMD's ROCm; pip " in refusal(pick_device)


def test_a_card_older_than_torchs_code_is_refused(gpus, monkeypatch):
    gpus(32 * GIB, name="Tesla V100-SXM2-32GB")
    check_generation(0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    line = (
        "Tesla V100-SXM2-32GB (compute capability 7.0) is older than the cards that torch 2.13.0+cu130 has code for "
        "(7.5 and later)"
    )
    assert refusal(check_generation, 0) == f"{line}; {ON_CPU}"
    assert refusal(choose_base) == f"{line}; {SAMPLE}"


@pytest.mark.parametrize("step", ["train", "predict", "merge_lora_weights"])
def test_every_step_that_computes_stops(machine, run_cli, pages, tmp_path, step):
    data, output = pages / "train.jsonl", tmp_path / "output"
    command, or_flag = {
        "train": (["--model_id", TINY, "--dataset", data, "--output_dir", output], " or give --use_cpu True"),
        "predict": ([data, TINY, "-o", output], ""),
        "merge_lora_weights": ([make_adapter(tmp_path / "adapter"), output, "--compare_on", data], ""),
    }[step]
    machine(A100)
    assert run_cli(step, *command) == (2, "", f"error: {CPU_BUILD}; {ON_CPU}{or_flag}\n")
    assert not output.exists()


def test_train_on_the_cpu_on_purpose(machine, train_tiny, pages):
    machine(A100)
    assert (train_tiny(pages / "train.jsonl", "--use_cpu", True, "--max_steps", 1) / "run.json").is_file()


def test_merging_itself_needs_no_card(machine, run_cli, tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    machine(A100)
    assert run_cli("merge_lora_weights", adapter, tmp_path / "merged")[0] == 0


def test_bytes_of_weights(seven_b, small_24b):
    assert weight_bytes(seven_b) == 14_496_047_104
    assert [round(weight_bytes(small_24b, kind) / GIB, 1) for kind in (None, FP8, FOUR_BITS)] == [44.7, 25.1, 14.7]
    # Of 32 layers of 436,224,000 bytes a half, and one whole.
    assert weight_bytes(seven_b, processes=2) == 14_496_047_104 - 16 * 436_224_000 + 436_224_000
    assert round(weight_bytes(small_24b, processes=2) / GIB, 1) == 25.1


def test_a_config_of_which_no_model_can_be_made(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mistral", "num_hidden_layers": 1, "hidden_size": "x"}')
    assert refusal(weight_bytes, tmp_path).startswith(f"{tmp_path / 'config.json'}: broken: ")


@pytest.mark.parametrize(
    ("free", "total", "limited", "needed", "four_bits", "rounded", "line"),
    [
        (79, 80, False, 45, "--load_in_4bit", 15, None),
        (15.4, 16, False, 15, None, None, None),
        (
            15.2, 15.2, False, 15, "--load_in_4bit", 5,
            "takes 15.0 GiB for its weights alone, and A10G has 15.2 GiB free: take a larger card, or --load_in_4bit "
            "(docs/recipes.md)",
        ),
        (
            12, 12, False, 45, "--load_in_4bit", 15,
            "takes 45.0 GiB for its weights alone, and A10G has 12.0 GiB free: take a larger card",
        ),
        (
            22, 22, False, 45, None, None,
            "takes 45.0 GiB for its weights alone, and A10G has 22.0 GiB free: take a larger card",
        ),
        (
            30, 80, False, 45, "--load_in_4bit True", 15,
            "takes 45.0 GiB for its weights alone, and A10G has 30.0 GiB free of 80.0: end the other programs on it "
            "(nvidia-smi shows them), or --load_in_4bit True (docs/recipes.md)",
        ),
        (
            24, 80, True, 45, "--load_in_4bit True", 15,
            "takes 45.0 GiB for its weights alone, and A10G has 24.0 GiB free of 80.0: raise --gpu_memory_gib, or "
            "--load_in_4bit True (docs/recipes.md)",
        ),
    ],
)  # fmt: skip
def test_what_to_do_on_a_card_that_is_too_small(free, total, limited, needed, four_bits, rounded, line):
    rounded = rounded and rounded * GIB
    assert too_big("A10G", free * GIB, total * GIB, limited, needed * GIB, four_bits, rounded) == line


def test_a_card_too_small_for_the_24b(gpus, small_24b):
    name = "mistralai/Mistral-Small-3.1-24B-Instruct-2503"
    gpus(22.1 * GIB, free=21.8 * GIB)
    assert refusal(check_size, name, small_24b, CARD, smaller="--load_in_4bit True") == (
        f"{name} in bf16 takes 44.7 GiB for its weights alone, and NVIDIA L4 has 21.8 GiB free: take a larger card, "
        "or --load_in_4bit True (docs/recipes.md)"
    )
    assert refusal(check_size, name, small_24b, CARD, processes=2, smaller="--load_in_4bit True").startswith(
        f"{name} in bf16, shared by 2 processes, takes 25.1 GiB for its weights alone"
    )
    check_size(name, small_24b, CARD, FOUR_BITS)
    gpus(44 * GIB)
    check_size(name, small_24b, CARD, processes=2)
    gpus(79.3 * GIB, share=0.25)
    assert refusal(check_size, name, small_24b, CARD, FP8) == (
        f"{name} in FP8 takes 25.1 GiB for its weights alone, and NVIDIA L4 has 19.8 GiB free of 79.3: raise "
        "--gpu_memory_gib"
    )


@pytest.mark.parametrize(
    ("step", "flags", "how"),
    [
        ("train", [], "bf16 takes 13.5 GiB for its weights alone, and NVIDIA L4 has 6.0 GiB free: take a larger "
         "card, or --load_in_4bit True (docs/recipes.md)"),
        ("train", ["--base_dtype", "fp8"], "FP8 takes 7.3 GiB for its weights alone, and NVIDIA L4 has 6.0 GiB free: "
         "take a larger card, or --load_in_4bit True instead of --base_dtype fp8 (docs/recipes.md)"),
        ("predict", [], "bf16 takes 13.5 GiB for its weights alone, and NVIDIA L4 has 6.0 GiB free: take a larger "
         "card, or --load_in_4bit (docs/recipes.md)"),
        ("predict", ["--no-load_in_4bit"], "bf16 takes 13.5 GiB for its weights alone, and NVIDIA L4 has 6.0 GiB "
         "free: take a larger card, or --load_in_4bit instead of --no-load_in_4bit (docs/recipes.md)"),
    ],
)  # fmt: skip
def test_steps_refuse_what_does_not_go_onto_the_card(
    gpus, monkeypatch, run_cli, pages, tmp_path, seven_b, step, flags, how
):
    gpus(6 * GIB)
    # The rest of the machine is a CPU: only where to load to is the card.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device_module, "pick_device", lambda *args, **kwargs: CARD)
    data = pages / "train.jsonl"
    command = {
        "train": ["--model_id", seven_b, "--dataset", data, "--output_dir", tmp_path / "output"],
        "predict": [data, seven_b],
    }[step]
    assert run_cli(step, *command, *flags) == (2, "", f"error: {seven_b} in {how}\n")


def test_merge_refuses_what_it_could_not_compare_before_it_merges(gpus, monkeypatch, run_cli, pages, tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    gpus(10 * 2**20)
    monkeypatch.setattr(device_module, "pick_device", lambda: CARD)
    code, out, err = run_cli(
        "merge_lora_weights", adapter, tmp_path / "merged", "--compare_on", pages / "train.jsonl"
    )  # fmt: skip
    assert (code, out) == (2, "")
    assert err == (
        f"error: {TINY} in bf16 takes 0.0 GiB for its weights alone, and NVIDIA L4 has 0.0 GiB free: take a larger "
        "card\n"
    )
    assert not (tmp_path / "merged").exists()


def test_run_sh_takes_the_24b_on_cards_that_hold_it(gpus):
    gpus(79.3 * GIB, 79.3 * GIB)
    assert choose_base() == (2, "mistralai/Mistral-Small-3.1-24B-Instruct-2503")
    assert choose_base("mistralai/Mistral-Nemo-Instruct-2407") == (2, "mistralai/Mistral-Nemo-Instruct-2407")
    assert choose_base(str(TINY)) == (2, "models/tiny")


@pytest.mark.parametrize(
    ("gib", "smaller"),
    [((12,), ""), ((22.1,), "on 24 and 48 GB, train it in 4 bits: docs/recipes.md; "),
     ((79.3, 44.5), "on 24 and 48 GB, train it in 4 bits: docs/recipes.md; ")],
)  # fmt: skip
def test_run_sh_stops_on_a_card_too_small_for_the_24b(gpus, gib, smaller):
    gpus(*(size * GIB for size in gib))
    assert refusal(choose_base) == (
        f"NVIDIA L4 has {gib[-1]:.1f} GiB, and Mistral-Small-3.1-24B-Instruct-2503 in bf16 needs a card of 70 GiB or "
        f"more; {smaller}{SAMPLE}"
    )
    assert choose_base("models/tiny") == (len(gib), "models/tiny")


@pytest.fixture
def run_sh(tmp_path):
    """Run run.sh behind its set-up, with a python that answers for the cards and notes what else is asked of it."""
    script = (ROOT / "run.sh").read_text(encoding="utf-8")
    script = "set -euo pipefail\n" + script[script.index("# All GPUs that are visible") :]
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(
            "#!/bin/sh\n"
            'if [ "$2" = mistral_ft.model.gpus ]; then echo "asked for ($3)" >> log; echo "$CARDS"; exit "$CODE"; fi\n'
            f'echo "{name} $* on (${{CUDA_VISIBLE_DEVICES-all}})" >> log\necho "Adapter saved in output/name"\n'
        )
        (tmp_path / name).chmod(0o755)

    def run(cards: str, code: int = 0, **environment: str) -> tuple[int, list[str]]:
        kept = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "base")}
        environment = kept | {"PATH": f"{tmp_path}:{kept['PATH']}", "CARDS": cards, "CODE": str(code)} | environment
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, (tmp_path / "log").read_text().splitlines()

    return run


def test_run_sh_starts_nothing_where_the_cards_say_so(run_sh):
    assert run_sh("", 2) == (2, ["asked for ()"])


@pytest.mark.parametrize(
    ("cards", "base", "launcher", "model", "epochs", "where"),
    [
        ("0 models/tiny", "", "python", "models/tiny", 2, "()"),
        ("1 models/tiny", "models/tiny", "python", "models/tiny", 2, "(all)"),
        ("1 mistralai/X", "", "python", "mistralai/X", 3, "(all)"),
        ("2 mistralai/X", "mistralai/X", "torchrun", "mistralai/X", 3, "(all)"),
    ],
)
def test_run_sh_has_every_step_use_the_same_base_and_cards(run_sh, cards, base, launcher, model, epochs, where):
    code, (asked, train, predict, predict_base, *rest) = run_sh(cards, base=base)
    assert (code, asked) == (0, f"asked for ({base})")
    assert re.match(rf"{launcher} .*-m train --model_id {model} .*--num_train_epochs {epochs} ", train)
    assert train.endswith(f" on {where}")
    assert predict.endswith(f"-m predict dataset/test.jsonl output/name on {where}")
    assert predict_base.endswith(f"-m predict dataset/test.jsonl {model} -o base.jsonl on {where}")
    assert [line.split()[2] for line in rest] == ["score", "score"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where torch cannot use the card")
def test_the_tests_choose_the_cpu_where_torch_cannot_use_the_card(tmp_path):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{A100}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    code = (
        "import os, torch; torch.cuda.is_available = lambda: False\n"
        "import tests.conftest; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("''\n", "")
