"""Upload a checkpoint folder to the Hugging Face hub, or to whatever ``HF_ENDPOINT`` names.

What is uploaded is for others to read: only folders that we wrote, of these only files that a checkpoint has, and in
our own records names of files instead of their places on this disk. The folder itself stays as it is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from emoe.checkpoint.companions import COPIED, is_named, lies_within
from emoe.checkpoint.digests import NAME as DIGESTS
from emoe.checkpoint.names import names_only
from emoe.conversion.workspace import EXPORTED, is_ours
from emoe.errors import UserError
from emoe.plainfiles import read_json, read_yaml
from emoe.runtime import format_bytes

RECORDS = ("emoe_*.json", "emoe_*.yaml")
"""Our own reports and settings."""

KNOWN = (
    *("model*.safetensors", "model.safetensors.index.json", "model*.gguf", "partition.safetensors", DIGESTS),
    *("config.json", "README.md", "emoe_*.png", "log.jsonl", *RECORDS, *COPIED),
)
"""Files that go along, beside our code; none from folders within the folder."""

CODE = {
    *("configuration_emoe.py", "routing_emoe.py", "ffn_emoe.py", "modeling_emoe.py", "portable.py"),
    *("configuration_moduleformer.py", "modeling_moduleformer.py", "router.py", "experts.py", "attention.py"),
    *("rotary.py", "block.py", "ops.py", "losses.py", "linear_portable.py", "stickbreaking_portable.py"),
}
"""The Python files that a checkpoint carries. Named here: the modules that know them take seconds to import."""

CONFIGS = ("config.json", "tokenizer_config.json")
"""Files of the source's in which paths are cut: in our provenance, and in fields that are a path as a whole."""

LISTED = 12
"""Files left out that a line names; of more, their number."""


class Parcel(NamedTuple):
    """What of a folder is uploaded."""

    files: list[Path]
    left_out: list[str]
    rewritten: dict[str, str]
    """Name → text, of files in which paths were cut to names."""

    def line(self, repo: str) -> str:
        """In words."""
        names = dict.fromkeys(re.sub(r"-\d+-of-\d+", "-*", file.name) for file in self.files)
        size = format_bytes(sum(file.stat().st_size for file in self.files))
        said = [f"to {repo}: {len(self.files)} files, {size}: {', '.join(names)}"]
        if self.rewritten:
            said.append(f"paths are cut to names in {', '.join(self.rewritten)}")
        more = f" and {len(self.left_out) - LISTED} more" if len(self.left_out) > LISTED else ""
        said.append(f"left out: {', '.join(self.left_out[:LISTED]) or 'nothing'}{more}")
        return "; ".join(said)


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


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    quiet: bool = False,
    flag: str = "--push-to-hub",
    say: Callable[[str], None] | None = None,
) -> str:
    """Make the repository if need be, then add the folder's files in one commit; returns the commit's address.

    Args:
        folder: a checkpoint that emoe wrote, with its card.
        repo: its name on the hub, ``org/name``.
        private: only for a repository that is new.
        quiet: no progress bars.
        flag: what errors call `repo`.
        say: called with what is uploaded and what is not, a line, before that is done.

    The token is that of ``HF_TOKEN`` or the stored login.

    Raises:
        UserError: no checkpoint of ours, no model card, a name that is none, no token, or a hub that refuses.
    """
    if not any((folder / name).is_file() for name in ("config.json", "model.gguf")):
        raise UserError(f"--model: {folder} is not a checkpoint folder: it has neither config.json nor model.gguf")
    if not is_ours(folder):
        raise UserError(f"--model: {folder} is not a checkpoint that emoe wrote; `hf upload` takes any folder")
    if not (folder / "README.md").is_file():
        raise UserError(f"--model: {folder} has no model card (README.md); a model without one is not uploaded")
    message = _message(folder)
    check_repository(repo, flag)
    parcel = packed(folder)
    if say:
        say(parcel.line(repo))

    from huggingface_hub import HfApi, logging
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    logging.set_verbosity_error()
    if quiet:
        disable_progress_bars()
    api = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        commit = api.create_commit(repo, _additions(parcel), commit_message=message)
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


def packed(folder: Path) -> Parcel:
    """What of a checkpoint's folder is uploaded.

    Raises:
        UserError: a damaged record.
    """
    files, left_out = [], []
    for path in sorted(folder.iterdir()):
        known = is_named(path.name, KNOWN) or path.name in CODE
        if known and path.is_file() and lies_within(path, folder):
            files.append(path)
        else:
            left_out.append(path.name + "/" * path.is_dir())
    texts = {file.name: _without_places(file) for file in files}
    return Parcel(files, left_out, {name: text for name, text in texts.items() if text is not None})


def _is_place(value: Any) -> bool:
    """Such as ``_name_or_path``, ``name_or_path`` and ``vocab_file`` of a model that was once saved from a folder."""
    return isinstance(value, str) and value.startswith(("/", "~/"))


def _without_places(file: Path) -> str | None:
    """The text of a record of ours with names instead of absolute paths; None if it has none, and for other files."""
    if file.suffix == ".yaml":
        value = read_yaml(file, "--model")
        named = names_only(value)
        return None if named == value else yaml.safe_dump(named, sort_keys=False)
    if file.name not in CONFIGS and not is_named(file.name, RECORDS):
        return None
    value = read_json(file)
    ours = value
    if file.name in CONFIGS:
        ours = {k: v for k, v in value.items() if k == "emoe_provenance" or _is_place(v)}
    named = value | names_only(ours)
    return None if named == value else json.dumps(named, indent=2) + "\n"


def _additions(parcel: Parcel) -> list[Any]:
    from huggingface_hub import CommitOperationAdd

    contents = {file.name: str(file) for file in parcel.files}
    contents |= {name: text.encode() for name, text in parcel.rewritten.items()}
    return [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in contents.items()]


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
