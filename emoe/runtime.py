"""What the operating system gives us: caches, safe writing, disk space, memory and clocks.

Everything that reaches a user's disk goes through `atomic_write` or `atomic_directory`: written beside its
destination, fsynced, renamed. A process killed at any instruction leaves the old state or the new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import os
import platform
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from emoe.disk import name_place
from emoe.errors import Busy, UserError


def cache_home() -> Path:
    """Folder for fetched assets: ``$EMOE_HOME``, by default ``~/.cache/emoe``. Not created here."""
    return Path(os.environ.get("EMOE_HOME") or Path.home() / ".cache" / "emoe")


def processor() -> str:
    """The processor's name as Linux has it; elsewhere the architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def sha256_file(path: Path, seen: Callable[[int], None] | None = None) -> str:
    """Hex sha256 of a file, read in 4 MiB pieces; ``seen`` is told the bytes of each."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            if seen:
                seen(len(piece))
    return digest.hexdigest()


def fsync_directory(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The process's umask; reading it means setting it for an instant."""
    current = os.umask(0)
    os.umask(current)
    return current


def settle(file: Path) -> None:
    """Put a written file on the disk, readable by whom the umask says: some libraries keep it to its owner."""
    with open(file, "rb+") as handle:
        os.fchmod(handle.fileno(), 0o666 & ~_umask())
        os.fsync(handle.fileno())


def settle_folder(folder: Path) -> None:
    """`settle` all files in ``folder`` and below, not what links point to."""
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            settle(file)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success fsync it and rename it to ``path``.

    The caller writes the temporary file in whatever way it likes. On an exception it is removed and whatever stood at
    ``path`` before still stands there.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        settle(temporary)
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except OSError as error:
        name_place(error, path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success fsync its files and rename it to ``path``.

    If another process finished ``path`` in the meantime, its folder is kept and ours is dropped. What killed processes
    left of the same ``path`` is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    temporary, held = _locked_folder(path)
    try:
        yield temporary
        settle_folder(temporary)
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
        fsync_directory(path.parent)
    except OSError as error:
        name_place(error, path)
        raise
    finally:
        os.close(held)
        shutil.rmtree(temporary, ignore_errors=True)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A new temporary folder beside ``path`` and the descriptor that holds its lock."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.is_dir():
            os.chmod(folder, 0o755)
            return folder, descriptor
        os.close(descriptor)  # another process took it for abandoned before it was locked


def _remove_abandoned(path: Path) -> None:
    """Remove temporary folders of ``path``."""
    remove_unheld(path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"))


def remove_unheld(folders: Iterable[Path]) -> None:
    """Remove folders whose process is gone: nobody holds their lock."""
    for folder in folders:
        if folder.is_dir() and not folder.is_symlink():
            try:
                descriptor = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:
                continue  # somebody else removed it
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            except OSError:
                pass  # somebody writes it now
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def scratch_directory(folder: Path, siblings: str) -> Iterator[None]:
    """``folder``, empty and ours until the end, when it goes; with it go those that killed processes left.

    Args:
        siblings: pattern of such folders beside it.

    Raises:
        UserError: as `sole_writer`.
    """
    with sole_writer(folder):
        remove_unheld(other for other in folder.parent.glob(siblings) if other != folder)
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def sole_writer(folder: Path, flag: str = "--output") -> Iterator[None]:
    """Hold ``folder``, made if need be, for this process alone, until the end or the process's death.

    Where it and its parents were made for this and nothing is in them at the end, they go again.

    Raises:
        Busy: another process holds it.
        UserError: it cannot be made.
    """
    made = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    descriptor = None
    while descriptor is None:
        descriptor = _lock(folder, flag)
    try:
        yield
    finally:
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()
        os.close(descriptor)


def _lock(folder: Path, flag: str) -> int | None:
    """Descriptor of ``folder``, locked; None when it went away meanwhile. Raises as `sole_writer`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        if _is_directory_or_gone(folder):
            return None
        raise UserError(f"{flag}: {folder} is a file; choose another name") from None
    except OSError as error:
        raise UserError(f"{flag}: cannot write {folder} ({error.strerror}); choose another folder") from None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            return descriptor
    except BlockingIOError:
        os.close(descriptor)
        raise Busy(f"{flag}: another process is writing {folder}; wait for it to end") from None
    except FileNotFoundError:
        pass
    os.close(descriptor)  # we locked a folder that its last writer removed
    return None


def _is_directory_or_gone(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return not any(place.is_symlink() and not place.exists() for place in (path, *path.parents))


def free_bytes(folder: Path) -> int:
    """Bytes free for us on the file system that holds ``folder`` or its nearest existing parent."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_space(folder: Path, needed: int, flag: str) -> None:
    """Raise `UserError` when the file system of ``folder`` has fewer than ``needed`` bytes free."""
    free = free_bytes(folder)
    if free < needed:
        raise UserError(
            f"{flag}: {folder} needs {format_bytes(needed)} but its disk has {format_bytes(free)} free; "
            "free some space or choose another folder"
        )


def peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes (Linux ``VmHWM``; `reset_peak_memory` restarts it)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory() -> None:
    """Start `peak_memory` anew where the kernel allows it (Linux); elsewhere it stays the peak since the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def multiplies_bfloat16_fast() -> bool:
    """Whether this processor has instructions for products of bfloat16; without them they are slower than float32's."""
    import torch

    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())  # private, and younger than some


def format_bytes(count: float) -> str:
    """``1536`` becomes ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


class Stopwatch:
    """Seconds and peak memory of named stages: ``with watch("clustering"): …``; stages may repeat and add up."""

    def __init__(self, on_stage: Callable[[str], None] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, int] = {}
        self._on_stage = on_stage

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self._on_stage:
            self._on_stage(stage)
        reset_peak_memory()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
            self.peak_bytes[stage] = max(self.peak_bytes.get(stage, 0), peak_memory())
