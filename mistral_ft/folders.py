"""From a model's name to a folder: a local one as it is, a hub id through the local cache."""

import os
import re
from pathlib import Path

from mistral_ft.errors import DISK_FAULTS, UserError
from mistral_ft.files import JsonObject, read_settings, sha256_file

RUN_FILE, CONFIG_FILE = "run.json", "config.yaml"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

MODEL_ID = "mistralai/Mistral-Small-3.1-24B-Instruct-2503"

# The hub repository also holds the weights a second time, in Mistral's own format; nobody here reads those.
SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
WEIGHT_FILES = ("model*.safetensors",)

MODEL_FILES = ("adapter_config.json", "config.json", "run.json")  # a folder with one is an adapter, a model, a run
HUB_ID = r"[\w.-]+/[\w.-]+"
LICENSES = {MODEL_ID: "apache-2.0"}  # as its card on the hub says


def locate(name: str, runs: str = "output") -> str:
    """What a model, adapter or run is given as, with a run's name alone made output/<name>.

    A folder of that name here comes first, unless it is none of these and the run is.

    Args:
        runs: the folder of the runs.

    Returns:
        The folder that is there; else the name as it is, which may be a hub id.
    """
    folders = [folder for folder in (Path(name), Path(runs) / name) if folder.is_dir()]
    known = [folder for folder in folders if any((folder / file).is_file() for file in MODEL_FILES)]
    return str(next(iter(known + folders), name))


def find_model_folder(model_id: str, weights: bool = True) -> Path:
    """The folder of a model; a hub id is downloaded unless the cache has it.

    Args:
        model_id: a folder, or a hub id such as "mistralai/Mistral-Small-3.1-24B-Instruct-2503".
        weights: False fetches the small files only, so that data can be checked before a long download.

    Raises:
        UserError: if there is no such folder or model, or the hub refuses it or cannot be reached.
    """
    if folder := _local_folder(model_id):
        return folder
    if not is_hub_id(model_id):
        raise UserError(
            f"{model_id}: no such folder, and no hub id such as mistralai/Mistral-Small-3.1-24B-Instruct-2503"
        )
    try:
        return Path(_download(model_id, SMALL_FILES + (WEIGHT_FILES if weights else ())))
    except UserError:
        raise
    except Exception as error:
        raise _explain(model_id, error) from error


def find_prompt_folders(model: str) -> tuple[Path, Path]:
    """The folders of a model's tokenizer and of its page settings, which an adapter leaves to its base.

    Args:
        model: an adapter's folder or checkpoint, or what `find_model_folder` takes; no weights are needed.

    Raises:
        UserError: if it, or an adapter's base, is not to be found.
    """
    folder = find_model_folder(model, weights=False)
    if not (folder / "adapter_config.json").is_file():
        return folder, folder
    base = read_settings(folder / "adapter_config.json").get("base_model_name_or_path")
    run = folder if (folder / "tokenizer.json").is_file() else folder.parent  # of a checkpoint
    return run, find_model_folder(str(base), weights=False)


def _local_folder(model_id: str) -> Path | None:
    # An adapter names its base as it was given to train, perhaps relative to this toolkit's folder.
    folders = (Path(model_id), Path(__file__).parents[1] / model_id)
    return next((folder for folder in folders if folder.is_dir()), None)


def is_hub_id(model_id: str) -> bool:
    """Whether a model's name is a hub id: it looks like one, and there is no such folder."""
    return _local_folder(model_id) is None and re.fullmatch(HUB_ID, model_id) is not None


def find_quantization(model_id: str) -> str | None:
    """How a model's weights are quantized, as its config.json here or else its name says; None if neither does.

    Nothing is downloaded.
    """
    folder = _local_folder(model_id)
    path = folder / "config.json" if folder else None
    if folder is None and is_hub_id(model_id):
        from huggingface_hub import try_to_load_from_cache  # slow to import

        cached = try_to_load_from_cache(model_id, "config.json")
        path = Path(cached) if isinstance(cached, str) else None
    if path is not None and path.is_file():
        config = read_settings(path).get("quantization_config") or {}
        return config.get("quant_method")
    return "4-bit" if re.search(r"(?i)4-?bit", model_id) else None


def _download(model_id: str, patterns: tuple[str, ...]) -> str:
    from huggingface_hub import snapshot_download  # slow to import, and local folders do without

    return snapshot_download(model_id, allow_patterns=list(patterns))


def _explain(model_id: str, error: Exception) -> Exception:
    """What a failed download means for the user; errors that are not the hub's come back as they are."""
    from huggingface_hub import errors, get_token

    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        return UserError(f"{model_id}: cannot be downloaded: {error.strerror} ({error.filename or 'the disk'})")
    token = get_token() is not None
    cause: BaseException | None = error
    while cause is not None:  # the refusal can hide behind the error of the cache that was tried next
        if isinstance(cause, errors.GatedRepoError):
            how = "its account has no access" if token else "none is set"
            return UserError(
                f"{model_id} is gated: accept its terms on https://huggingface.co/{model_id}, then set HF_TOKEN to a "
                f"token of that account ({how})"
            )
        if isinstance(cause, errors.RepositoryNotFoundError):
            how = "or HF_TOKEN has no access to it" if token else "or it is private and HF_TOKEN is not set"
            return UserError(f"{model_id}: no such folder here and no such model on the hub, {how}")
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError)):
        why = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else "the hub cannot be reached"
        return UserError(f"{model_id}: no such folder here, not in the hub's local cache, and {why}")
    return error


def full_name(model_id: str) -> str:
    """A folder's whole path, or a hub id."""
    return str(Path(model_id).resolve()) if Path(model_id).is_dir() else model_id


def find_run_folder(folder: str | os.PathLike) -> Path:
    """The run folder of an adapter: the folder itself, or the one above a checkpoint."""
    folder = Path(folder)
    return folder if (folder / RUN_FILE).is_file() else folder.parent


def read_run(folder: str | os.PathLike) -> JsonObject:
    """The run file of a run folder.

    Raises:
        UserError: if there is none.
    """
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        raise UserError(f"{path}: missing, so {folder} was not made by train")
    return read_settings(path)


def trained_tokenizer(run: str | os.PathLike) -> str | None:
    """SHA-256 of the tokenizer.json that a run was trained with."""
    return read_run(run).get("prompt", {}).get("tokenizer_sha256")


def check_tokenizer(run: Path) -> None:
    """Raises UserError if a run's tokenizer is not the one that its adapter was trained with."""
    path, trained_with = run / "tokenizer.json", trained_tokenizer(run)
    if not path.is_file() or sha256_file(path) != trained_with:
        raise UserError(f"{path}: is not the one the adapter was trained with (see {RUN_FILE})")
