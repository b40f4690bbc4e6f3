"""run.sh and test.sh before the first step: which Python, which .venv, which packages; and steps on Windows."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT, row, write_jsonl

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
NEEDED = "Python 3.10 to 3.14 is needed; to use another: PYTHON=python3.12 ./run.sh"
HALF = "lib/python3.12/site-packages/half-1.dist-info"

# Stands for a Python, and for that of a .venv that it makes. Files beside it make it fail: no-venv, no-pip, pip-fails.
FAKE_PYTHON = """#!/bin/sh
here=$(dirname "$0")
echo "$*" >>{calls}
case "$*" in
*version_info*) echo {version} ;;
*ensurepip*) [ ! -e "$here/no-venv" ] ;;
*"import pip") [ ! -e "$here/no-pip" ] ;;
"-m venv --clear .venv")
    [ ! -e "$here/venv-fails" ] || {{ mkdir .venv; exit 1; }}
    rm -rf .venv
    mkdir -p .venv/bin .venv/lib/python{version}/site-packages
    cp "$0" .venv/bin/python
    echo "VIRTUAL_ENV='$PWD/.venv'" >.venv/bin/activate
    ;;
"-m pip "*)
    for tool in ruff mypy; do
        printf '#!/bin/sh\\n' >"$here/$tool"
        chmod +x "$here/$tool"
    done
    [ ! -e "$here/pip-fails" ]
    ;;
esac
"""


class Repository:
    """A copy of the scripts in a folder with a space in its name, and a PATH that has no Python but ours."""

    def __init__(self, folder: Path):
        self.path = folder / "our repository"
        self.path.mkdir()
        for name in ("run.sh", "test.sh", "setup.sh"):
            shutil.copy(ROOT / name, self.path)
        # What comes after the set-up is left out.
        before, line, _ = (self.path / "run.sh").read_text().partition(". .venv/bin/activate\n")
        (self.path / "run.sh").write_text(before + line + 'echo "started in $VIRTUAL_ENV"\n')
        for name in ("requirements.txt", "requirements-dev.txt", "requirements-4bit.txt", "requirements-heic.txt"):
            (self.path / name).write_text(f"# {name}\n")
        self.venv = self.path / ".venv"
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in ("bash", "sh", "env", "dirname", "basename", "cat", "rm", "mkdir", "cp", "chmod"):
            (self.bin / tool).symlink_to(shutil.which(tool))
        self._calls = folder / "calls"

    def python(self, version: str, name: str = "python3") -> Path:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(FAKE_PYTHON.format(calls=f"'{self._calls}'", version=version))
        path.chmod(0o755)
        return path

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> tuple[int, list[str], list[str]]:
        """Exit code, lines of stdout, lines of stderr."""
        self._calls.write_text("")
        done = subprocess.run(
            command or ["./run.sh"], cwd=cwd or self.path, capture_output=True, text=True, timeout=60,
            env={"PATH": str(self.bin), **environment},
        )  # fmt: skip
        return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()

    def calls(self, start: str = "-m") -> list[str]:
        """What Python was started with by the last run."""
        return [call for call in self._calls.read_text().splitlines() if call.startswith(start)]

    @property
    def started(self) -> str:
        return f"started in {self.venv}"


@pytest.fixture
def repository(tmp_path) -> Repository:
    return Repository(tmp_path)


@pytest.fixture
def installed(repository) -> Repository:
    """After a first run.sh with Python 3.12."""
    repository.python("3.12")
    assert repository.run()[0] == 0
    return repository


INSTALL = "-m pip install --quiet --upgrade -r requirements.txt"
INSTALL_DEV = "-m pip install --quiet --upgrade -r requirements-dev.txt"


@pytest.mark.parametrize("version", PYTHONS)
def test_the_first_run_installs_and_the_second_does_not(repository, version):
    repository.python(version)
    assert repository.run() == (0, ["Installing the packages of requirements.txt into .venv", repository.started], [])
    assert repository.calls() == ["-m venv --clear .venv", INSTALL]
    assert repository.run() == (0, [repository.started], [])
    assert repository.calls() == []


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.9", "3.15", "3.100", "4.1"])
def test_a_python_that_is_too_old_or_too_new(repository, version):
    repository.python(version)
    assert repository.run() == (2, [], [f"error: python3 is Python {version}: {NEEDED}"])
    assert not repository.venv.exists()


def test_no_python(repository):
    assert repository.run() == (2, [], [f"error: python3 was not found or does not start: {NEEDED}"])
    repository.python("3.12")
    code, out, err = repository.run("sh", "test.sh", PYTHON="python3.99")
    assert (code, out) == (2, [])
    assert err == [f"error: python3.99 was not found or does not start: {NEEDED.replace('run.sh', 'test.sh')}"]
    assert not repository.venv.exists()


def test_a_python_without_venv(repository):
    repository.python("3.12")
    (repository.bin / "no-venv").touch()
    assert repository.run() == (
        2,
        [],
        ["error: python3 has no venv module: install it (on Debian and Ubuntu: apt install python3.12-venv)"],
    )
    assert not repository.venv.exists()


def test_a_venv_that_could_not_be_made_is_not_left(repository):
    repository.python("3.12")
    (repository.bin / "venv-fails").touch()
    assert repository.run() == (2, [], ["error: python3 could not make .venv, see above"])
    assert not repository.venv.exists()


def python_gone(repository):
    (repository.venv / "bin/python").unlink()
    (repository.venv / "bin/python").symlink_to("/no/such/python")
    return "its Python does not start"


def folder_moved(repository):
    repository.path = repository.path.rename(repository.path.with_name("elsewhere"))
    repository.venv = repository.path / ".venv"
    return "it was made in another folder"


def folder_copied(repository):
    repository.path = Path(shutil.copytree(repository.path, repository.path.with_name("copy")))
    repository.venv = repository.path / ".venv"
    return "it was made in another folder"


def version_unsupported(repository):
    shutil.copy(repository.python("3.9", "old"), repository.venv / "bin/python")
    return "it has Python 3.9"


def system_upgraded(repository):
    shutil.copy(repository.python("3.13", "new"), repository.venv / "bin/python")
    return "its packages are for another Python than 3.13"


def half_made(repository):
    shutil.rmtree(repository.venv)
    repository.venv.mkdir()
    return "its Python does not start"


def without_pip(repository):
    (repository.venv / "bin/no-pip").touch()
    return "it has no pip"


FAULTS = [python_gone, folder_moved, folder_copied, version_unsupported, system_upgraded, half_made, without_pip]


@pytest.mark.parametrize("break_it", FAULTS)
def test_a_stale_venv_is_made_anew(installed, break_it):
    fault = break_it(installed)
    code, out, err = installed.run()
    assert (code, err) == (0, [])
    assert out == [
        f"Making .venv anew with Python 3.12: {fault}",
        "Installing the packages of requirements.txt into .venv",
        installed.started,
    ]
    assert installed.calls() == ["-m venv --clear .venv", INSTALL]
    assert installed.run() == (0, [installed.started], [])


@pytest.mark.parametrize("break_it", FAULTS)
def test_a_stale_venv_stays_where_no_other_can_be_made(installed, break_it):
    break_it(installed)
    before = sorted(installed.venv.rglob("*"))
    (installed.bin / "no-venv").touch()
    assert installed.run()[:2] == (2, [])
    installed.python("3.9")
    assert installed.run() == (2, [], [f"error: python3 is Python 3.9: {NEEDED}"])
    assert sorted(installed.venv.rglob("*")) == before


def test_a_venv_is_of_the_python_that_the_user_names(installed):
    installed.python("3.13", "python3.13")
    out = installed.run(PYTHON="python3.13")[1]
    assert out[0] == "Making .venv anew with Python 3.13: it has Python 3.12, not 3.13"
    assert installed.run(PYTHON="python3.13") == (0, [installed.started], [])
    assert installed.run() == (0, [installed.started], [])  # python3 is 3.12, which nobody asked for


def test_a_venv_that_works_needs_no_other_python(installed):
    installed.python("3.9")
    assert installed.run() == (0, [installed.started], [])
    (installed.bin / "python3").unlink()
    assert installed.run() == (0, [installed.started], [])
    assert installed.run(PYTHON="python3")[0] == 2


def test_a_venv_behind_a_link_is_used(installed, tmp_path):
    """One .venv for two checkouts."""
    installed.venv.rename(tmp_path / "shared")
    (tmp_path / "shared/bin/activate").write_text(f"VIRTUAL_ENV='{tmp_path}/shared'\n")
    installed.venv.symlink_to(tmp_path / "shared")
    assert installed.run() == (0, [f"started in {tmp_path}/shared"], [])


def test_an_installation_that_failed_is_finished(installed):
    (installed.path / "requirements.txt").write_text("numpy==2\n")
    (installed.venv / "bin/pip-fails").touch()
    (installed.venv / HALF).mkdir()
    (installed.venv / HALF / "METADATA").touch()
    whole = installed.venv / HALF.replace("half", "whole") / "RECORD"
    whole.parent.mkdir()
    whole.touch()
    for _ in range(2):
        code, out, err = installed.run()
        assert (code, out) == (2, ["Installing the packages of requirements.txt into .venv"])
        assert err == [
            "error: pip could not install the packages of requirements.txt, see above; ./run.sh again continues"
        ]
        assert installed.calls() == [INSTALL]
    assert not (installed.venv / HALF).exists()  # pip would take it for installed
    assert whole.exists()
    (installed.path / "requirements.txt").write_text("# requirements.txt\n")  # even as it was installed before
    (installed.venv / "bin/pip-fails").unlink()
    assert installed.run()[0] == 0
    assert installed.calls() == [INSTALL]
    assert installed.run() == (0, [installed.started], [])


def test_tests_need_more_packages(installed):
    assert installed.run("./test.sh", "-k", "two words")[0] == 0
    assert installed.calls() == [INSTALL_DEV, "-m pytest -n 2 -k two words"]
    assert installed.run("./test.sh")[0] == 0
    assert installed.calls() == ["-m pytest -n 2"]
    assert installed.run() == (0, [installed.started], [])


@pytest.mark.parametrize(
    ("changed", "run", "test"),
    [
        ("requirements.txt", [INSTALL], [INSTALL_DEV]),
        ("requirements-4bit.txt", [], [INSTALL_DEV]),
        ("requirements-heic.txt", [], [INSTALL_DEV]),
        ("requirements-dev.txt", [], [INSTALL_DEV]),
    ],
)
def test_changed_requirements_are_installed(installed, changed, run, test):
    installed.run("./test.sh")
    (installed.path / changed).write_text("numpy==2\n")
    os.utime(installed.path / changed, (0, 0))  # as unpacked from an archive: older than the installation
    assert installed.run()[0] == 0
    assert installed.calls() == run
    assert installed.run("./test.sh")[0] == 0
    assert installed.calls("-m pip") == test
    assert installed.run() == (0, [installed.started], [])


def test_packages_for_tests_that_failed_are_installed_for_both(installed):
    (installed.venv / "bin/pip-fails").touch()
    assert installed.run("./test.sh")[0] == 2
    (installed.venv / "bin/pip-fails").unlink()
    assert installed.run()[0] == 0
    assert installed.calls() == [INSTALL]


def test_help_starts_nothing(repository):
    for flag in ("-h", "--help"):
        code, out, err = repository.run("./run.sh", flag)
        assert (code, out[0], err) == (0, "usage: [NAME=VALUE …] ./run.sh", [])
        assert {line.split()[0] for line in out if line.startswith("  ")} == {
            "train_file", "test_file", "base", "PYTHON",
        }  # fmt: skip
        assert "base=models/tiny ./run.sh" in "\n".join(out)
        code, out, err = repository.run("./test.sh", flag)
        assert (code, out[0], err) == (0, "usage: ./test.sh [pytest's arguments]", [])
    assert not repository.venv.exists()


@pytest.mark.parametrize("arguments", [["train"], ["--base", "x"], [""]])
def test_run_takes_no_arguments(repository, arguments):
    repository.python("3.12")
    assert repository.run("./run.sh", *arguments) == (
        2,
        [],
        [f"error: run.sh takes no arguments but got: {' '.join(arguments)} (see ./run.sh --help)"],
    )
    assert not repository.venv.exists()


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_any_shell_and_any_folder(repository, tmp_path, shell):
    repository.python("3.12")
    for command in ([shell, "our repository/run.sh"], ["our repository/run.sh"], [shell, f"{repository.path}/run.sh"]):
        code, out, err = repository.run(*command, cwd=tmp_path, CDPATH=str(tmp_path.parent))
        assert (code, out[-1], err) == (0, repository.started, [])
    code, _, err = repository.run(shell, "our repository/test.sh", "-k", "two words", cwd=tmp_path)
    assert (code, err) == (0, [])
    assert repository.calls() == [INSTALL_DEV, "-m pytest -n 2 -k two words"]


def test_bash_in_posix_mode(repository):
    """As sh is on a Mac."""
    repository.python("3.12")
    text = (repository.path / "run.sh").read_text()
    (repository.path / "run.sh").write_text(text + "echo $SHELLOPTS\n")
    code, out, _ = repository.run("bash", "--posix", "run.sh")
    assert code == 0
    assert "posix" not in out[-1]
    assert "pipefail" in out[-1]


def test_no_bash(repository):
    shell = Path(shutil.which("dash") or "/bin/sh").resolve()
    if shell.name == "bash":
        pytest.skip("sh is bash here")
    (repository.bin / "bash").unlink()
    assert repository.run(str(shell), "run.sh") == (2, [], ["error: run.sh needs bash: install it"])


def test_windows_is_refused(repository):
    repository.python("3.12")
    assert repository.run(OS="Windows_NT") == (2, [], ["error: ./run.sh needs Linux, macOS or WSL"])
    assert not repository.venv.exists()


@pytest.mark.slow
def test_a_real_python(repository):
    repository.run(PYTHON=sys.executable)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert repository.run() == (0, [repository.started], [])
    assert (repository.venv / f"lib/python{version}/site-packages/pip").is_dir()
    folder_moved(repository)
    code, out, _ = repository.run(PYTHON=sys.executable)
    assert code == 0
    assert out[0] == f"Making .venv anew with Python {version}: it was made in another folder"
    assert out[-1] == repository.started


@pytest.mark.parametrize("python", PYTHONS)
def test_each_package_has_one_version_for_each_python(python):
    names, pinned = set(), []
    for file in ROOT.glob("requirements*.txt"):
        for line in re.findall(r"^\w[^#\n]*", file.read_text(), re.MULTILINE):
            requirement = Requirement(line.strip())
            names.add(requirement.name)
            assert str(requirement.specifier).startswith("==")
            if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
                pinned.append(requirement.name)
    if python == "3.10":
        names.remove("mistral-common")  # has none
    assert sorted(pinned) == sorted(names)
    assert len(names) > 20


# What Windows lacks, taken away before a step is started.
WINDOWS = """
import os, runpy, signal, sys
sys.modules["fcntl"] = None
del os.fchmod, signal.SIGUSR1, signal.SIGUSR2, signal.sigwaitinfo, signal.pthread_sigmask, signal.pthread_kill
really_open = os.open
def open_file(path, *rest, **named):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return really_open(path, *rest, **named)
os.open = open_file
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def on_windows(*command) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", WINDOWS, *command], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("command", [["train"], ["merge_lora_weights", "a", "b"], ["server", "x.jsonl"]])
def test_steps_that_windows_cannot_do(command):
    done = on_windows(*command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == (
        "error: this step needs Linux, macOS or WSL: Windows lacks its file locks and signals"
    )
    assert "Traceback" not in done.stderr


def test_steps_that_windows_can_do(tmp_path):
    data = write_jsonl(tmp_path / "p.jsonl", [row(0, "A") | {"actual": "B"}])
    done = on_windows("score", data, "-e", tmp_path / "errors.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Accuracy = 0/1")
    assert json.loads((tmp_path / "errors.jsonl").read_text())["expected"] == "A"
    assert on_windows("reformat_data", data, tmp_path / "new.jsonl").returncode == 0
    assert on_windows("validate_data", data).returncode == 0
    assert on_windows("train_status", tmp_path).returncode == 2
