"""Which cards this machine shows, whether or not torch can use them, and what follows from that.

    python -m mistral_ft.model.gpus [base]

is how run.sh asks for the number of GPUs and the base. The embedded base and the CPU stand in for the real ones only
where the machine shows no NVIDIA card, or the user chose them. torch is imported where it is used.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from mistral_ft.cli import run_step
from mistral_ft.errors import UserError
from mistral_ft.folders import MODEL_ID

ROOT = Path("/")  # where /proc and /sys are
NVIDIA, AMD = "0x10de", "0x1002"  # PCI vendors
# On machines with eight cards nvidia-smi can take several seconds; with a broken driver it may hang.
SMI_SECONDS = 20
# The oldest driver that runs programs of a CUDA version: "CUDA minor version compatibility" in NVIDIA's release notes.
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}
# Graphics within a processor have less memory of their own.
LEAST_AMD_GIB = 8

EMBEDDED = "models/tiny"
LEAST_GIB = 70  # of a card on which run.sh trains the 24B in bf16
LEAST_GIB_IN_4_BITS = 20  # training takes 17.6 with all layers computed twice (docs/measured.md)

ON_CPU = "to compute on the CPU on purpose, put CUDA_VISIBLE_DEVICES= in front of the command"


@dataclass(frozen=True)
class Card:
    """An NVIDIA card, with as much as is known of it."""

    name: str
    gib: float | None = None
    driver: str | None = None

    def __str__(self) -> str:
        known = [f"{self.gib:.1f} GiB"] if self.gib else []
        known += [f"driver {self.driver}"] if self.driver else []
        return self.name + (f" ({', '.join(known)})" if known else "")


def nvidia_cards(root: Path | None = None) -> tuple[list[Card], str | None]:
    """The NVIDIA cards that the driver shows, and what nvidia-smi complains of, if it does.

    Args:
        root: where /proc and /sys are (default: `ROOT`).
    """
    root = root or ROOT
    cards, complaint = _ask_nvidia_smi()
    if cards:
        return cards, None
    driver = re.search(r"\s(\d+\.[\d.]+)\b", _read(root / "proc/driver/nvidia/version"))
    for path in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        name = re.search(r"^Model:\s*(.*\S)", _read(path), re.MULTILINE)
        cards.append(Card(name[1] if name else "NVIDIA card", driver=driver and driver[1]))
    if not cards and complaint:
        cards = [Card("NVIDIA card")] * _count_on_pci(root, NVIDIA)
    return cards, complaint


def _ask_nvidia_smi() -> tuple[list[Card], str | None]:
    if shutil.which("nvidia-smi") is None:
        return [], None
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        output, _ = process.communicate(timeout=SMI_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()  # no wait for its end, which a driver that hangs can prevent
        return [], f"nvidia-smi does not answer within {SMI_SECONDS:g} s"
    except OSError as error:
        return [], f"nvidia-smi does not start: {error.strerror}"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if process.returncode:
        return [], f"nvidia-smi says: {lines[0].rstrip('.') if lines else f'exit code {process.returncode}'}"
    fields = [line.rsplit(", ", 2) for line in lines]
    return [
        # A card that shares the processor's memory has "[N/A]" there.
        Card(name, int(mib) / 1024 if mib.isdecimal() else None, driver)
        for name, mib, driver in (parts for parts in fields if len(parts) == 3)
    ], None


def _count_on_pci(root: Path, vendor: str) -> int:
    """How many display controllers (PCI class 03) of a vendor there are."""
    return sum(
        _read(device / "vendor") == vendor and _read(device / "class").startswith("0x03")
        for device in root.glob("sys/bus/pci/devices/*")
    )


def _read(path: Path) -> str:
    """What a file of the kernel says, or "" if it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def other_card(root: Path | None = None) -> str | None:
    """Why a card that is no NVIDIA card with its driver is not used; None if there is none or the CPU is chosen.

    Args:
        root: where /sys is (default: `ROOT`).
    """
    root = root or ROOT
    if cpu_is_chosen():
        return None
    if (platform.system(), platform.machine()) == ("Darwin", "arm64"):
        return "This toolkit does not compute on Apple's GPU"
    for device in sorted(root.glob("sys/class/drm/renderD*/device")):
        gib = int(_read(device / "mem_info_vram_total") or 0) / 2**30
        if _read(device / "vendor") == AMD and gib >= LEAST_AMD_GIB:
            return f"This toolkit does not compute on AMD's GPUs, such as the one of {gib:.1f} GiB here"
    return "The NVIDIA card here has no driver" if _count_on_pci(root, NVIDIA) else None


def cpu_is_chosen() -> bool:
    """Whether CUDA_VISIBLE_DEVICES hides all cards on purpose: it is empty, or begins with a name of none."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return first in ("", "-1", "NoDevFiles")


def use_gpu(use_cpu: bool = False, otherwise: str = ON_CPU) -> bool:
    """Whether to compute on a GPU.

    Args:
        use_cpu: whether the user asked for the CPU.
        otherwise: how to do without the card, as the end of the error's text.

    Raises:
        UserError: if an NVIDIA card is here that torch cannot use, or torch is one for AMD's cards.
    """
    if use_cpu or cpu_is_chosen():
        return False
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch warns of is what the line says
        usable = torch.cuda.is_available()
    if usable and torch.version.hip:
        raise UserError(
            f"torch {torch.__version__} is made for AMD's ROCm, on which this toolkit was never run, so its results "
            f"there are unknown; {otherwise}"
        )
    if usable:
        return True
    cards, complaint = nvidia_cards()
    if cards:
        raise UserError(f"{_why_unusable(cards, complaint)}; {otherwise}")
    return False


def _why_unusable(cards: list[Card], complaint: str | None) -> str:
    """What is here, why torch cannot use it, and how to change that."""
    import torch

    several = len(cards) > 1
    found = f"{cards[0]} and {len(cards) - 1} more are here" if several else f"{cards[0]} is here"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    first = visible.split(",")[0].strip()
    if first.isdecimal() and int(first) >= len(cards):
        return f"CUDA_VISIBLE_DEVICES={visible} names no card: {found}, numbered from 0"
    found += f", but torch cannot use {'them' if several else 'it'}"
    version = torch.__version__.split("+")[0]
    driver = int(cards[0].driver.split(".")[0]) if cards[0].driver else None
    # The newest CUDA that the driver runs. torch 2.13 is made for none before 12.
    newest = max((cuda for cuda, oldest in OLDEST_DRIVERS.items() if driver is None or driver >= oldest), default=0)
    install = f"pip install --force-reinstall torch=={version} --index-url <PyTorch's index for CUDA {newest}>"
    if torch.version.cuda is None:
        kind = "made for AMD's ROCm" if torch.version.hip else "a build for CPUs only"
        fix = install if newest >= 12 else f"update the driver to {OLDEST_DRIVERS[12]} or newer, and reinstall torch"
        return f"{found}: this torch {torch.__version__} is {kind}; {fix}"
    if complaint:
        return f"{found}: {complaint}; restart the machine, or install the driver again"
    needed = OLDEST_DRIVERS.get(int(torch.version.cuda.split(".")[0]))
    if needed and driver and driver < needed:
        other = f", or {install}" if newest >= 12 else ""
        return (
            f"{found}: this torch {version} is made for CUDA {torch.version.cuda}, which needs driver {needed} or "
            f"newer; update the driver{other}"
        )
    hint = f"CUDA_VISIBLE_DEVICES={visible} may name none of them" if visible else "see what nvidia-smi shows"
    if shutil.which("nvidia-smi") is None:
        hint = "in a container, start it with its GPUs (docker run --gpus all)"
    return f"{found}: {_what_torch_says()}; {hint}"


def _what_torch_says() -> str:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"torch says: {str(error).splitlines()[0].rstrip('.')}"
    return "torch finds none"


def check_generation(index: int, otherwise: str = ON_CPU) -> None:
    """Raises UserError if the card is older than all those that this torch has code for."""
    import torch

    built = [int(number) for arch in torch.cuda.get_arch_list() for number in re.findall(r"_(\d+)", arch)]
    major, minor = torch.cuda.get_device_capability(index)
    if built and 10 * major + minor < min(built):
        raise UserError(
            f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor}) is older than the cards that "
            f"torch {torch.__version__} has code for ({min(built) // 10}.{min(built) % 10} and later); {otherwise}"
        )


def choose_base(asked: str = "") -> tuple[int, str]:
    """On how many GPUs run.sh works, and with which base.

    Args:
        asked: the base that the user named, or "".

    Raises:
        UserError: if a card is here that the base cannot be trained on, unless the user asked for the embedded one.
    """
    otherwise = f"to run the sample with the embedded base on purpose: base={EMBEDDED} ./run.sh"
    embedded = asked and Path(asked).resolve() == Path(__file__).parents[2] / EMBEDDED
    try:
        gpus = usable_gpus(otherwise)
    except UserError:
        if not embedded:
            raise
        gpus = 0
    if embedded or asked:
        return gpus, EMBEDDED if embedded else asked
    if not gpus:
        reason = other_card() or "No GPU to compute on"
        print(f"{reason}: using the embedded base {EMBEDDED}, which reads the sample's print.", file=sys.stderr)
        return 0, EMBEDDED
    import torch

    card = min((torch.cuda.get_device_properties(n) for n in range(gpus)), key=lambda card: card.total_memory)
    gib = card.total_memory / 2**30
    if gib < LEAST_GIB:
        smaller = "on 24 and 48 GB, train it in 4 bits: docs/recipes.md; " if gib >= LEAST_GIB_IN_4_BITS else ""
        raise UserError(
            f"{card.name} has {gib:.1f} GiB, and {MODEL_ID.split('/')[1]} in bf16 needs a card of {LEAST_GIB} GiB or "
            f"more; {smaller}{otherwise}"
        )
    return gpus, MODEL_ID


def usable_gpus(otherwise: str = ON_CPU) -> int:
    """How many GPUs torch can use. Raises UserError as `use_gpu` does."""
    if not use_gpu(otherwise=otherwise):
        return 0
    import torch

    gpus = torch.cuda.device_count()
    for index in range(gpus):
        check_generation(index, otherwise)
    return gpus


def main() -> None:
    print(*choose_base(*sys.argv[1:]))


if __name__ == "__main__":
    run_step(main)
