"""Upload a checkpoint folder to the Hugging Face hub, or to whatever ``HF_ENDPOINT`` names."""

from __future__ import annotations

import os
from pathlib import Path

from emoe.conversion.workspace import EXPORTED
from emoe.errors import UserError
from emoe.plainfiles import read_json

HIDDEN = (".*", "**/.*", "*.tmp")
"""Files that do not go along."""


def check_repository(repo: str, flag: str = "--push-to-hub") -> None:
    """Raise `UserError` for what needs no hub to be seen: a name that is none, or a client told to stay offline."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{flag}: '{repo}' is not a repository's name ({_first_line(error)})") from None
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{flag}: HF_HUB_OFFLINE is set; unset it to upload")


def push(folder: Path, repo: str, *, private: bool = False, quiet: bool = False, flag: str = "--push-to-hub") -> str:
    """Make the repository if need be, then add the whole folder in one commit; returns the commit's address.

    Args:
        folder: a checkpoint that emoe wrote, with its card.
        repo: its name on the hub, ``org/name``.
        private: only for a repository that is new.
        quiet: no progress bars.
        flag: what errors call `repo`.

    The token is that of ``HF_TOKEN`` or the stored login.

    Raises:
        UserError: no checkpoint, no model card, a name that is none, no token, or a hub that refuses.
    """
    if not any((folder / name).is_file() for name in ("config.json", "model.gguf")):
        raise UserError(f"--model: {folder} is not a checkpoint folder: it has neither config.json nor model.gguf")
    if not (folder / "README.md").is_file():
        raise UserError(f"--model: {folder} has no model card (README.md); a model without one is not uploaded")
    message = _message(folder)
    check_repository(repo, flag)

    from huggingface_hub import HfApi, logging
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    logging.set_verbosity_error()
    if quiet:
        disable_progress_bars()
    api = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=list(HIDDEN)
        )
    except LocalTokenNotFoundError:
        raise UserError(f"{flag}: no token; set HF_TOKEN or run `hf auth login`") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        hint = "check HF_TOKEN and its right to write there" if status in (401, 403) else "try again"
        raise UserError(f"{flag}: the hub refused {repo} ({_first_line(error)}); {hint}") from None
    except Exception as error:
        if not _is_network(error):
            raise
        where = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        raise UserError(f"{flag}: {where} cannot be reached ({_first_line(error)})") from None
    return str(commit.commit_url)


def _message(folder: Path) -> str:
    import emoe

    report = folder / EXPORTED
    kind = read_json(report).get("format") if report.is_file() else "converted model"
    if not isinstance(kind, str):
        raise UserError(f"--model: {report} names no format; export the model again")
    return f"{kind}, by emoe {emoe.__version__}"


def _is_network(error: Exception) -> bool:
    """Whether the client gave up on the network; huggingface_hub changes its HTTP library from version to version."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in ("httpx", "httpx2", "requests")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
