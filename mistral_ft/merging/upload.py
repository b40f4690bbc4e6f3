"""From a model folder to a repository on the hub."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from mistral_ft.errors import UserError
from mistral_ft.folders import HUB_ID


def check_upload(repo: str, private: bool) -> None:
    """See to it, ahead of long work, that a repository can be uploaded to: it is new or empty, and a token is there.

    Raises:
        UserError: what stands in the way.
    """
    from huggingface_hub import HfApi, errors, get_token

    if not re.fullmatch(HUB_ID, repo):
        raise UserError(f"--push_to_hub {repo}: give a hub id such as my-name/my-model")
    if get_token() is None:
        raise UserError("--push_to_hub: no token: set HF_TOKEN to one with write access, or run hf auth login")
    api = HfApi()
    with _upload_errors(repo):
        api.whoami()
        try:
            info = api.model_info(repo)
        except errors.RepositoryNotFoundError:
            return
        _check_private(repo, info.private, private)
        files = {file.rfilename for file in info.siblings or []} - {".gitattributes", "README.md"}
        if files:
            raise UserError(f"--push_to_hub {repo}: holds files already, such as {min(files)}; give a new one")


def upload(folder: Path, repo: str, private: bool) -> str:
    """Upload a model folder to a repository, which is made if need be; returns its address.

    Raises:
        UserError: if the hub refuses it or cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _upload_errors(repo, f"; {folder} is whole, try again: hf upload {repo} {folder} .{' --private' * private}"):
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        _check_private(repo, api.model_info(repo).private, private)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Merged model")
    return str(url)


def _check_private(repo: str, is_private: bool | None, wanted: bool) -> None:
    if wanted and not is_private:
        raise UserError(f"--push_to_hub {repo}: is there already and public; --private cannot change that")


@contextlib.contextmanager
def _upload_errors(repo: str, then: str = "") -> Iterator[None]:
    """Turn the hub's errors into one line; none of it shows the token."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        why = {401: "the token is not valid", 403: "the token has no write access there"}.get(status)
        why = why or error.server_message or f"the hub answered with status {status}"
        raise UserError(f"--push_to_hub {repo}: {why}{then}") from error
    except errors.OfflineModeIsEnabled:
        raise UserError(f"--push_to_hub {repo}: HF_HUB_OFFLINE is set{then}") from None
    except errors.HTTPError as error:  # that of the HTTP library, whichever it is
        raise UserError(f"--push_to_hub {repo}: the hub cannot be reached{then}") from error
