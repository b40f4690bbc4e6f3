"""Runs the toolkit's steps as a user would, and reads what they print and log.

Nothing that a bench looks for may be missing without a word: it ends with the line or the number that is not there.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import gpu

ROOT = Path(__file__).parents[1]


@dataclass
class Step:
    """A step that has ended.

    Attributes:
        code: its exit code.
        lines: what it printed on stdout and stderr.
        own_gib: memory of its own (page cache and mapped files not counted) that it took at most.
        resident_gib: the same with the files it had mapped.
    """

    code: int
    lines: list[str]
    own_gib: float = 0.0
    resident_gib: float = 0.0


class PeakRam(threading.Thread):
    """Watches how much memory a process takes, at most; in GiB."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.status = Path(f"/proc/{pid}/status")
        self.own = self.resident = 0.0

    def run(self) -> None:
        while True:
            try:
                text = self.status.read_text()
            except OSError:
                return
            sizes = {name: int(size) / 2**20 for name, size in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
            if "RssAnon" not in sizes:  # it has ended
                return
            self.own, self.resident = max(self.own, sizes["RssAnon"]), max(self.resident, sizes["VmRSS"])
            time.sleep(0.02)


def start(module: str, *arguments, processes: int = 1, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a step, in several processes with torchrun; what it prints is to be read from its stdout."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes] if processes > 1 else []
    return subprocess.Popen(
        [str(word) for word in (sys.executable, *launch, "-m", module, *arguments)], cwd=ROOT, text=True,
        env=os.environ | (environment or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def run(
    module: str,
    *arguments,
    processes: int = 1,
    environment: dict[str, str] | None = None,
    seconds: float = 24 * 3600,
    shown: bool = True,
) -> Step:
    """Run a step and show its lines, with the seconds, and the memory of its own taken until then, when they came.

    Args:
        seconds: after them, it is killed.
        shown: whether to show its lines; if not, the last ones are shown if it fails.
    """
    started, lines = time.perf_counter(), []
    process = start(module, *arguments, processes=processes, environment=environment)
    ram, timer = PeakRam(process.pid), threading.Timer(seconds, _kill, [process])
    ram.start()
    timer.start()
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if shown:
                print(f"[{time.perf_counter() - started:6.1f} s, {ram.own:4.1f} GiB] {lines[-1]}", flush=True)
        code = process.wait()
    finally:
        timer.cancel()
        _kill(process)
    if code and not shown:
        print("\n".join(lines[-60:]), flush=True)
    return Step(code, lines, ram.own, ram.resident)


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def said(lines: Sequence[str], pattern: str) -> str:
    """The pattern's group in the last line that begins with it; ends the bench if there is none."""
    found = [match[1] for line in lines if (match := re.match(pattern, line))]
    if not found:
        sys.exit(f"the step has printed no line like {pattern!r}; if its wording has changed, change the bench's")
    return found[-1]


def run_folder(lines: Sequence[str]) -> Path:
    """The folder of the run that train has just ended."""
    return Path(said(lines, r"Adapter saved in (.+)"))


def peak_memory(lines: Sequence[str]) -> str:
    """What a step says of the GPU memory it took at most, such as "75.3 GiB"; of several processes that of each too."""
    return said(lines, r"Peak GPU memory (.+)") if gpu.on_gpu() else "0.0 GiB"


def tokens_per_second(run: Path) -> float:
    """A run's speed, without the first of the intervals between two logs, which holds what is slow once."""
    logs = json.loads((run / "trainer_state.json").read_text())["log_history"]
    rates = [entry["tokens_per_second"] for entry in logs if "tokens_per_second" in entry][1:]
    if not rates:
        sys.exit(f"{run / 'trainer_state.json'}: has fewer than two logs with tokens_per_second")
    return len(rates) / sum(1 / rate for rate in rates)
