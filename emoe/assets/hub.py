"""Snapshots from the model hub, through huggingface_hub: its cache, its login, ``HF_HUB_OFFLINE`` all count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from emoe.bytecount import ByteCount, Show
from emoe.errors import UserError

ALLOW = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "LICENSE*",
    "README.md",
)
"""Configuration, tokenizer, safetensors, the card with its licence. Never ``*.bin``: a pickle can run code when it is
loaded."""

IGNORE = ("*/*", "consolidated*", "*.fp16.*", "*.bin")
"""Subfolders (other runtimes' exports, original checkpoints) and second copies of the same weights."""


def download(
    name: str,
    hub_id: str,
    *,
    gated: bool = False,
    token: str | None = None,
    revision: str | None = None,
    progress: Callable[[str], None] | None = None,
    show: Show | None = None,
) -> Path:
    """The snapshot folder of ``hub_id``, from the cache where it is complete.

    Args:
        name: what the user wrote, for messages.
        hub_id: ``org/name``.
        gated: the table says that it is gated; the hub hides some gated models as "not found".
        token: hub token; None uses ``HF_TOKEN`` or the stored login.
        revision: branch, tag or commit; None is the default branch.
        progress: called with one line before the hub is asked.
        show: told how much has come, in MiB, in place of the client's own bars.

    Raises:
        UserError: gated, absent, unreachable, or without safetensors; one line each, naming what to do.
    """
    import huggingface_hub
    from huggingface_hub import errors

    label = name if name == hub_id else f"{name} ({hub_id})"
    if progress:
        progress(f"asking the hub for {label}")
    wanted = {"allow_patterns": list(ALLOW), "ignore_patterns": list(IGNORE)}
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, token=token, tqdm_class=_bar_of(show) if show else None, **wanted
            )
        )
    except errors.GatedRepoError as error:
        raise UserError(_gated_message(label)) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"--revision: {label} has no revision '{revision}'") from error
    except errors.RepositoryNotFoundError as error:
        if gated:
            raise UserError(_gated_message(label)) from error
        raise UserError(
            f"--model: the hub has no '{hub_id}', or it is private: check the spelling, or run `hf auth login`"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"--model: '{hub_id}' is not a valid hub id") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(_unreachable_message(label, error)) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise UserError(f"--model: the hub answered {status} for {label}; try again, or pass a local folder") from error
    except (OSError, errors.HTTPError) as error:
        raise UserError(_unreachable_message(label, error)) from error
    if not (folder / "config.json").is_file():
        raise UserError(f"--model: {label} has no config.json at this revision; it is not a transformers model")
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"--model: {label} has no safetensors weights at this revision, and pickled .bin files are not loaded; "
            "try --revision refs/pr/N of a safetensors conversion, or pass a folder saved with save_pretrained"
        )
    return folder


def _bar_of(show: Show) -> type:
    """A class of bars for the client that draw nothing: of all that it makes, the one of bytes on the disk tells us."""
    from huggingface_hub.utils import tqdm  # of another class, the client would not say which bar it is

    class Bar(tqdm):
        def __init__(self, *args, **kwargs) -> None:
            ours = kwargs.get("name") == "huggingface_hub.snapshot_download" and kwargs.get("unit") == "B"
            self.count = ByteCount(show, "fetching", 0) if ours else None
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            if self.count:
                self.count.total = int(self.total or 0)  # grows with each file that the client begins
                self.count(int(n or 0))

    return Bar


def _gated_message(label: str) -> str:
    return f"{label} is gated: accept its licence on its hub page and run `hf auth login` or set HF_TOKEN"


def _unreachable_message(label: str, error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        reason = "HF_HUB_OFFLINE is set and it is not completely in the hub cache"
    else:
        lines = str(error.__cause__ or error).splitlines()
        reason = f"the hub cannot be reached ({lines[0].strip() if lines else type(error).__name__})"
    return f"--model: {label}: {reason}; pass a local folder or a .gguf file instead"


def is_cached(hub_id: str) -> bool:
    """Whether some snapshot of ``hub_id`` with config and safetensors lies in the hub cache."""
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    return any(
        (snapshot / "config.json").exists() and any(snapshot.glob("*.safetensors")) for snapshot in snapshots.glob("*")
    )
