"""Where a checkpoint is made before it is done: two hidden folders beside the output.

``.{name}.emoe-partial`` fills up with shards and becomes ``{name}`` by a rename when everything in it is complete.
``.{name}.emoe-state`` holds the lock and what ``--resume`` starts from; it goes last. The source and an earlier output
are not touched before that rename, and a process killed at any point leaves something that ``--resume`` can finish.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe.conversion.resuming import Work, refuse_finished, refuse_other_settings
from emoe.disk import full_disk_told
from emoe.errors import UserError
from emoe.plainfiles import read_json
from emoe.runtime import fsync_directory, write_text

if TYPE_CHECKING:  # what is named and looked at here is also asked before torch is imported
    import torch

    from emoe.distributed import Group

STATE = "state.json"

PRETRAINED = "emoe_pretrain.json"
"""Report that lies in a model which `emoe pretrain` has made."""

RECOVERED = "emoe_recover.json"
"""Report of `emoe recover`, beside a config.json of ours."""

TUNED, PRUNED = "emoe_tune.json", "emoe_prune.json"
"""Reports of verbs that may write a stock model. Its config.json stays a stock one: what would stand there of ours, the
provenance, stands in the report."""

EXPORTED = "emoe_export.json"
"""Report of `emoe export`, which writes what is stock in all else."""


def is_ours(folder: Path) -> bool:
    """Whether we have written a checkpoint."""
    if _has_report(folder):
        return True
    try:
        return has_own_config(read_json(folder / "config.json"))
    except UserError:
        return False


def is_our_stock_model(folder: Path, flag: str) -> bool:
    """Whether a checkpoint is a stock model that we have trained, pruned or exported."""
    gguf = (folder / EXPORTED).is_file() and not (folder / "config.json").exists()
    return gguf or (_has_report(folder) and not has_own_config(read_json(folder / "config.json", flag)))


def _has_report(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (PRETRAINED, TUNED, PRUNED, EXPORTED))


def has_own_config(config: dict[str, Any]) -> bool:
    """Whether a config.json is of one of our model classes."""
    return str(config.get("model_type", "")).startswith(("emoe_", "moduleformer"))


class Workspace:
    """The unfinished output of one conversion, training or operation.

    Args:
        output: the folder that is to be.
        source: the folder of the dense checkpoint, which the output may not overlap; None if there is none.
        resume: unfinished work may be there and is gone on with.
        overwrite: an earlier checkpoint of ours, finished or not, may be there and is replaced.
        work: what is made, with the settings; None for what is done in one go and cannot be gone on with.
        rank: number of this process among those that work on it; 0 alone looks after the folders.
    """

    def __init__(
        self,
        output: Path,
        source: Path | None,
        *,
        resume: bool,
        overwrite: bool,
        work: Work | None = None,
        rank: int = 0,
    ) -> None:
        self.rank, self.work = rank, work
        self.output, self.source = output.absolute(), source.absolute() if source else None
        self.folder, self.state_folder, self.retired = (
            self.output.with_name(f".{self.output.name}.emoe-{kind}") for kind in ("partial", "state", "replaced")
        )
        self.resume, self.overwrite = resume, overwrite

    def check(self) -> None:
        """Raise `UserError` when something is in the way, before any work is done. Nothing is touched."""
        here, there = self.output.resolve(), self.source and self.source.resolve()
        if there and (here == there or here in there.parents or there in here.parents):
            raise UserError(f"--output: {self.output} overlaps the model's own folder {self.source}; choose another")
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output: {self.output} is a file; choose another name")
        if self.output.is_mount():
            raise UserError(f"--output: {self.output} is a mount point, which cannot be renamed; choose a folder in it")
        if self.output.exists() and any(self.output.iterdir()):
            resumed = self.work and self.resume and not self.overwrite
            if resumed and not self.folder.exists() and is_ours(self.output):
                refuse_finished(self.output, self.work)
            if not self.overwrite:
                raise UserError(f"--output: {self.output} exists; choose another folder or add --overwrite")
            if not is_ours(self.output):
                raise UserError(
                    f"--output: {self.output} is not a checkpoint of ours, --overwrite will not touch it; "
                    "choose another folder"
                )
        # What a killed process left without a state, its own or the Trainer's, serves nobody.
        begun = (self.state_folder / STATE).exists() or any(self.state_folder.glob("training/checkpoint-*"))
        if begun and not (self.resume or self.overwrite):
            what = f"an unfinished {self.work.kind}" if self.work else "unfinished work"
            go_on = "add --resume to go on with it or" if self.work else "choose another folder, or add"
            raise UserError(f"--output: {what} lies in {self.folder}; {go_on} --overwrite to start again")
        parent = self.output.parent
        while not parent.exists():
            parent = parent.parent
        if not os.access(parent, os.W_OK):
            raise UserError(f"--output: {parent} is not writable; choose another folder")

    @contextlib.contextmanager
    def open(self, group: Group) -> Iterator[Workspace]:
        """Hold the workspace for these processes alone.

        Raises:
            UserError: it cannot be had, or, while it is held, cannot be written.
        """
        way_on = "add --resume" if self.work else "try again"
        told = full_disk_told(self.output, way_on, kept="any earlier output is untouched")
        with told, contextlib.ExitStack() as held:
            group.first_then_all(lambda: self._take(held))
            yield self

    def _take(self, held: contextlib.ExitStack) -> None:
        self._refuse_if_held()
        self.check_early()
        try:
            self.state_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parent = self.output.parent
            raise UserError(f"--output: cannot write in {parent} ({error.strerror}); choose another folder") from None
        lock = held.enter_context(open(self.state_folder / "lock", "w"))  # noqa: SIM115
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = os.fstat(lock.fileno()).st_nlink == 0  # removed by one that ended meanwhile
        except OSError:
            taken = True
        if taken:
            raise self._held()
        self._recover()
        self.check()
        if not self.resume:
            (self.state_folder / STATE).unlink(missing_ok=True)  # first: it speaks of shards in the folder
            shutil.rmtree(self.folder, ignore_errors=True)
        if not self.folder.exists():  # killed after the last rename: the state speaks of shards that have moved on
            (self.state_folder / STATE).unlink(missing_ok=True)
            self.folder.mkdir()
        for folder in (self.folder, self.state_folder):
            for stale in folder.glob(".*.tmp"):
                stale.unlink()

    def _held(self) -> UserError:
        return UserError(f"--output: another process is writing {self.output}; wait for it to end")

    def _refuse_if_held(self) -> None:
        """Say so before anything is said of unfinished work: it is being finished."""
        if (self.state_folder / "lock").is_file():
            with open(self.state_folder / "lock") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except OSError:
                    raise self._held() from None

    def check_early(self) -> None:
        """`check`, by who is to write there: what a kill has left behind a finished output goes first."""
        self._clear_finished()
        self.check()

    def _clear_finished(self) -> None:
        """Remove the state of a `publish` that was killed behind its renames: nothing is left to go on with."""
        if self.output.exists() and self.state_folder.exists() and not self.folder.exists():
            with contextlib.suppress(OSError), open(self.state_folder / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(self.retired, ignore_errors=True)
                shutil.rmtree(self.state_folder, ignore_errors=True)

    def _recover(self) -> None:
        """Undo the first half of a `publish` that was killed between its two renames."""
        if self.retired.exists():
            if self.output.exists():
                shutil.rmtree(self.retired)
            else:
                os.rename(self.retired, self.output)

    def held_bytes(self) -> int:
        """Bytes that unfinished work has written already."""
        return sum(p.stat().st_size for p in self.folder.glob("*")) if self.resume and self.folder.exists() else 0

    def load_state(self, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
        """The last complete state of a conversion with the same settings; None to start from the beginning.

        Raises:
            UserError: the unfinished conversion had other settings; the first that differs is named.
        """
        if not (self.state_folder / STATE).is_file():
            return None
        state = read_json(self.state_folder / STATE, "--resume")
        refuse_other_settings(fingerprint, {key: state["fingerprint"].get(key) for key in fingerprint}, "conversion")
        return state

    def state_tensors(self, state: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors of this process's state, one at a time."""
        from safetensors import safe_open

        with safe_open(self.state_folder / f"{state['tensors']}-{self.rank}.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)

    def save_state(self, state: dict[str, Any], tensors: dict[str, torch.Tensor], group: Group) -> None:
        """Replace the state in one step: the tensors of all processes first, then the JSON that names them."""
        from emoe.checkpoint.writer import save_tensors

        name = f"state-{state['phase']}-{state['next_layer']}"
        save_tensors(self.state_folder / f"{name}-{self.rank}.safetensors", tensors)
        group.wait()
        group.first_then_all(lambda: write_text(self.state_folder / STATE, json.dumps(state | {"tensors": name})))
        for old in self.state_folder.glob(f"state-*-{self.rank}.safetensors"):
            if not old.name.startswith(f"{name}-"):
                old.unlink()

    def publish(self) -> None:
        """Rename the folder to the output; an overwritten output goes only then, the state last.

        Raises:
            UserError: somebody has put something there since `check`.
        """
        if self.output.exists():
            empty = self.output.is_dir() and not any(self.output.iterdir())
            if not empty and not (self.overwrite and is_ours(self.output)):
                raise UserError(f"--output: somebody has written {self.output} meanwhile; choose another folder")
            os.rename(self.output, self.retired)
        try:
            os.rename(self.folder, self.output)
        except OSError:
            self._recover()
            raise
        fsync_directory(self.output.parent)
        shutil.rmtree(self.retired, ignore_errors=True)
        shutil.rmtree(self.state_folder, ignore_errors=True)

    def abandon(self) -> None:
        """After a failure: keep what --resume can use, drop a workspace that holds no state."""
        if self.rank == 0 and not (self.state_folder / STATE).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self.state_folder, ignore_errors=True)
