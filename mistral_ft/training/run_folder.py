"""A training run's folder: its name, what is written into it, and how it is found again."""

import contextlib
import os
import platform
import random
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mistral_ft.data.prompt.files import save_prompt_files
from mistral_ft.data.rows import data_files
from mistral_ft.distributed import from_first, rank, world_size
from mistral_ft.errors import UserError
from mistral_ft.files import fsync_path, read_settings, settle, sha256_file, write_json
from mistral_ft.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG_FILE, RUN_FILE, full_name, locate, read_run
from mistral_ft.model.card import write_model_card
from mistral_ft.training.arguments import ABOUT_EVALUATION, changed_fields
from mistral_ft.training.checkpoints import fault, newest_first, newest_sound, step_of
from mistral_ft.training.config_file import write_config
from mistral_ft.training.settings import Settings
from mistral_ft.training.training_arguments import FinetuneArguments

PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "pillow", "numpy")

ADJECTIVES = (
    "amber bold brave bright brisk calm candid clear clever cosy crisp daring deep eager early fair fine fleet fond "
    "gentle glad golden grand happy hardy honest humble jolly keen kind lively loyal lucid mellow merry mild neat "
    "noble patient plain polite proud quick quiet rapid ready sharp silent silver sleek smart snug solid spry steady "
    "sunny swift tidy warm wise witty"
).split()
NOUNS = (
    "acorn alder aspen badger beaver birch bison brook canyon cedar cliff clover condor coral crane delta dune eagle "
    "elm falcon fern finch fjord fox glacier grove harbor hare hazel heron ibis island jay juniper lagoon lake lark "
    "linden lynx maple marsh meadow moose oak orchid osprey otter owl panda pine plover pond quail raven reef river "
    "robin sparrow spruce stork swan thrush tulip walnut willow wren"
).split()


@dataclass
class Run:
    """A run's folder while train works on it.

    Attributes:
        folder: where everything goes.
        checkpoint: the checkpoint to continue from, None for a new run.
    """

    folder: Path
    checkpoint: Path | None = None

    @classmethod
    def find(cls, settings: Settings) -> "Run | None":
        """The run that --resume_from_checkpoint names, the same in all processes; None for a new one.

        Raises:
            UserError: if it cannot be continued so.
        """
        args = settings.training
        wanted, output_dir = args.resume_from_checkpoint, args.output_dir or ""
        # Where it cannot be made, training ends here and not after all pages were read.
        from_first(lambda: Path(output_dir).mkdir(parents=True, exist_ok=True))
        if wanted is None:
            return None
        if wanted != "auto":
            return from_first(lambda: cls.resume(locate(wanted, output_dir), settings))
        found = from_first(lambda: cls.resume_newest(output_dir, settings))
        if found is None or not found.is_over:
            print(f"Continuing from {found.checkpoint}" if found else "Nothing to continue from: a new run")
        return found

    @classmethod
    def create(cls, settings: Settings, base: Path, rows: int) -> "Run":
        """Make a new folder with a name one can say, such as amber-otter-3f9a12c0, and write what is known now.

        Args:
            base: folder of the base model, whose tokenizer and processor files go with the adapter.
            rows: number of records.

        Raises:
            OSError: if the folder cannot be made.
        """
        draw = random.SystemRandom()
        name = f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}-{secrets.token_hex(4)}"
        run = cls(Path(settings.training.output_dir or "") / name)
        run.folder.mkdir(parents=True)
        with run.cleaned_up_if_useless():
            run._write(settings, base, rows)
        return run

    def _write(self, settings: Settings, base: Path, rows: int) -> None:
        template = save_prompt_files(base, self.folder)
        chosen = {
            name: _json(settings.training.given if name == "training" else changed_fields(arguments))
            for name, arguments in vars(settings).items()
        }
        files = hash_files(settings.data.dataset)
        flat = {name: value for group in chosen.values() for name, value in group.items()}
        write_config(
            self.folder / CONFIG_FILE,
            {n: v for n, v in flat.items() if n != "resume_from_checkpoint" and v is not None},
        )
        write_json(
            self.folder / RUN_FILE,
            {
                "number": 1 + max((number for number, _ in _runs(self.folder.parent)), default=0),
                "base_model": settings.model.model_id,
                "data": {"files": files, "rows": rows},
                "resume": _describe(settings, files),
                "prompt": {
                    "template": template,
                    "tokenizer_sha256": sha256_file(self.folder / "tokenizer.json"),
                },
                "settings": chosen,
                "versions": versions(),
            },
        )

    @classmethod
    def resume(cls, path: str | os.PathLike, settings: Settings) -> "Run":
        """Continue the run of a checkpoint, or of a run folder's newest sound checkpoint.

        Raises:
            UserError: if there is none, or the data, the base or the adapter's settings are not those of the run.
        """
        checkpoint = find_checkpoint(path)
        folder = checkpoint.parent
        if changed := _changes(read_run(folder), _describe(settings, hash_files(settings.data.dataset))):
            raise UserError(
                f"{folder}: cannot be continued with another {', '.join(changed)}; its own are in its {RUN_FILE}"
            )
        return cls(folder, checkpoint)

    @classmethod
    def resume_newest(cls, output_dir: str | os.PathLike, settings: Settings) -> "Run | None":
        """Continue the newest run with the same settings that has a sound checkpoint, or an adapter: it is over then.

        Returns:
            The run, its checkpoint None if it is over and has none; None if there is no such run.

        Raises:
            UserError: if the newest run of this data's name is unfinished, and its data has been edited.
        """
        files = hash_files(settings.data.dataset)
        now, names = _describe(settings, files), [file["path"] for file in files]
        for _, folder in sorted(_runs(output_dir), reverse=True):
            written = read_run(folder)
            changed = _changes(written, now)
            over = (folder / ADAPTER_CONFIG).exists()
            stopped = newest_first(folder) and not over
            if changed == ["data"] and stopped and [file["path"] for file in written["data"]["files"]] == names:
                raise UserError(
                    f"{', '.join(names)}: edited since {folder} was stopped; put back what it was, or start anew "
                    "without --resume_from_checkpoint"
                )
            if not changed and ((checkpoint := newest_sound(folder)) or over):
                return cls(folder, checkpoint)
        return None

    def enter(self, args: FinetuneArguments) -> None:
        """Have the arguments name the run's folder as the one to write into.

        Raises:
            UserError: if this process does not see it.
        """
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: not to be seen by process {rank()}; --output_dir must be on a shared disk")
        args.output_dir, args.run_name = str(self.folder), args.run_name or self.folder.name

    @property
    def step(self) -> int:
        """The step to go on from, 0 for a new run."""
        return step_of(self.checkpoint) if self.checkpoint else 0

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to continue."""
        return self.checkpoint is None and (self.folder / ADAPTER_CONFIG).exists()

    def read_pack_length(self) -> int | None:
        """Tokens of a packed sequence, once that is decided. To resume, it must be what it was."""
        return read_run(self.folder).get("pack_length")

    def write_pack_length(self, length: int | None) -> None:
        """Keep it in the run file."""
        if rank() == 0:
            write_json(self.folder / RUN_FILE, read_run(self.folder) | {"pack_length": length})

    @contextlib.contextmanager
    def cleaned_up_if_useless(self) -> Iterator[None]:
        """On a failure, remove the folder if it holds neither a checkpoint nor an adapter, and say how to continue."""
        try:
            yield
        except BaseException:
            if rank():
                pass
            elif newest_first(self.folder):
                print(f"Continue with --resume_from_checkpoint {self.folder}", file=sys.stderr)
            elif not (self.folder / ADAPTER_CONFIG).exists():
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def save_adapter(self, model: Any) -> None:
        """Write a peft model's adapter and its card into the folder; adapter_config.json, which makes it one, last."""
        for left in self.folder.glob(".*"):  # what a killed process left of earlier tries
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".adapter.") as temporary:
            model.save_pretrained(temporary)
            config = read_settings(Path(temporary) / ADAPTER_CONFIG)
            base = config["base_model_name_or_path"]
            write_model_card(self.folder, self.folder.name, "peft", base, config, read_run(self.folder))
            for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
                settle(Path(temporary) / name)
                os.replace(Path(temporary) / name, self.folder / name)
        fsync_path(self.folder)


# TrainingArguments that change nothing of what is learned.
FREE_TO_CHANGE = (
    *ABOUT_EVALUATION, "output_dir", "resume_from_checkpoint", "report_to", "run_name", "save_total_limit",
    "dataloader_num_workers", "dataloader_p", "ddp_",
)  # fmt: skip


def _describe(settings: Settings, files: Sequence[dict[str, str]]) -> dict[str, Any]:
    """What must be the same for a run to be continued; `files` as `hash_files` names those of the data."""
    training = _json(settings.training.given)
    return {
        "base_model": full_name(settings.model.model_id),
        "rounding": settings.model.rounding,
        "data": [file["sha256"] for file in files],
        "images_dir": settings.data.images_dir,
        "evaluation": {"eval_fraction": settings.evaluation.eval_fraction},
        "lora": _json(changed_fields(settings.lora)),
        "speed": {
            name: value
            for name, value in changed_fields(settings.speed).items()
            if name not in ("compile", "shard_base")  # the same numbers, computed elsewhere
        },
        "training": {name: value for name, value in training.items() if not name.startswith(FREE_TO_CHANGE)},
        "processes": world_size(),
    }


def _changes(run: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of a run's description is another now."""
    then = {"processes": 1, "evaluation": {}} | run.get("resume", {})  # as older runs were
    return [name for part in now for name in _differences(part, then.get(part), now[part])]


def _differences(part: str, then: Any, now: Any) -> list[str]:
    """Names of what differs: flags for dictionaries of them, else the part's own name."""
    if isinstance(then, dict):
        return [f"--{name}" for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
    names = {"base_model": "base model", "processes": f"number of processes ({then})"}
    names |= {"images_dir": "--images_dir", "rounding": "--load_in_4bit or --base_dtype"}
    return [names.get(part, part)] if then != now else []


def _runs(output_dir: str | os.PathLike) -> list[tuple[int, Path]]:
    """The runs in a folder, each with its number: clocks can be set back, numbers only grow."""
    found = []
    for path in Path(output_dir).glob(f"*/{RUN_FILE}"):
        with contextlib.suppress(ValueError, TypeError):  # not a run of ours
            found.append((int(read_run(path.parent).get("number", 0)), path.parent))
    return found


def hash_files(paths: Sequence[str | os.PathLike]) -> list[dict[str, str]]:
    """Names and SHA-256 of the files that hold the rows of data sources."""
    return [{"path": str(file), "sha256": sha256_file(file)} for path in paths for file in data_files(path)]


def _json(values: dict[str, Any]) -> dict[str, Any]:
    """Values as JSON has them; enums and the like as text, tokens left out."""
    plain = (int, float, list, dict, type(None))
    return {k: v if isinstance(v, plain) else str(v) for k, v in values.items() if k != "hub_token"}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The checkpoint to resume from: a checkpoint folder, or the newest complete one of a run folder.

    Raises:
        UserError: if there is none.
    """
    path = Path(path)
    if step_of(path) < 0:
        checkpoint = newest_sound(path) if (path / RUN_FILE).is_file() else None
    else:
        problem = fault(path)
        if problem:
            raise UserError(f"{path}: cannot be continued from, {problem}; give its run folder for the one before it")
        checkpoint = path
    if checkpoint is None or not (checkpoint.parent / RUN_FILE).is_file():
        raise UserError(f"{path}: holds no complete checkpoint to resume from; give a run folder such as output/<name>")
    return checkpoint
