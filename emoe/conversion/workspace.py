"""Where a conversion happens before it is done: a hidden folder beside the output.

``.{name}.emoe-partial`` fills up with shards and states and is renamed to ``{name}`` when everything in it is complete.
A process killed at any point leaves it behind for ``--resume``; the source and an earlier output are never touched
before that last rename.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from emoe.checkpoint.reader import read_json
from emoe.errors import UserError
from emoe.runtime import atomic_write, fsync_directory, write_text

STATE = "state.json"


class Workspace:
    """The unfinished output of one conversion.

    Args:
        output: the folder that is to be.
        resume: an unfinished conversion may be there and is gone on with.
        overwrite: a finished or unfinished one may be there and is replaced.
    """

    def __init__(self, output: Path, *, resume: bool, overwrite: bool) -> None:
        self.output = output.absolute()
        self.folder = self.output.with_name(f".{self.output.name}.emoe-partial")
        self.retired = self.output.with_name(f".{self.output.name}.emoe-replaced")
        self.resume, self.overwrite = resume, overwrite

    def check(self) -> None:
        """Raise `UserError` when something is in the way, before any work is done."""
        if self.output.exists() and not self.overwrite and not (self.resume and self.folder.exists()):
            raise UserError(f"--output: {self.output} exists; choose another folder or add --overwrite")
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output: {self.output} is a file; choose another name")
        if self.folder.exists() and not (self.resume or self.overwrite):
            raise UserError(
                f"--output: an unfinished conversion lies in {self.folder}; "
                "add --resume to go on with it or --overwrite to start again"
            )
        parent = self.output.parent
        while not parent.exists():
            parent = parent.parent
        if not os.access(parent, os.W_OK):
            raise UserError(f"--output: {parent} is not writable; choose another folder")

    @contextlib.contextmanager
    def open(self) -> Iterator[Workspace]:
        """Hold the workspace for this process alone."""
        self.check()
        if self.folder.exists() and not self.resume:
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"--output: another process is writing {self.output}; wait for it to end") from None
            for stale in self.folder.glob(".*.tmp"):
                stale.unlink()
            yield self

    def load_state(self, fingerprint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """The last complete state of a conversion with the same settings; None to start from the beginning.

        Raises:
            UserError: the unfinished conversion had other settings; the first that differs is named.
        """
        if not (self.folder / STATE).is_file():
            return None
        state = read_json(self.folder / STATE, "--resume")
        for key, value in fingerprint.items():
            if state["fingerprint"].get(key) != value:
                raise UserError(
                    f"--resume: the unfinished conversion had {key}={state['fingerprint'].get(key)!r}, this one has "
                    f"{value!r}; use the same settings or --overwrite"
                )
        return state, load_file(self.folder / state["tensors"])

    def save_state(self, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Replace the state in one step: the tensors first, then the JSON that names them."""
        state = {**state, "tensors": f"state-{state['next_layer']}.safetensors"}
        with atomic_write(self.folder / state["tensors"]) as temporary:
            save_file(tensors, temporary)
        write_text(self.folder / STATE, json.dumps(state))
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != state["tensors"]:
                old.unlink()

    def publish(self) -> None:
        """Drop the states and rename the folder to the output; an overwritten output goes only then."""
        for file in (*self.folder.glob("state-*.safetensors"), self.folder / STATE, self.folder / ".lock"):
            file.unlink(missing_ok=True)
        if self.output.exists():
            shutil.rmtree(self.retired, ignore_errors=True)
            os.rename(self.output, self.retired)
        os.rename(self.folder, self.output)
        fsync_directory(self.output.parent)
        shutil.rmtree(self.retired, ignore_errors=True)

    def abandon(self) -> None:
        """After a failure: keep what --resume can use, drop a workspace that holds no state."""
        if not (self.folder / STATE).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
