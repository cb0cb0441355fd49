"""The C++ kernels for CPUs (csrc/): compiled on first use, kept for later processes, and never a requirement.

The library lies in ``$EMOE_KERNELS_CACHE``, by default ``~/.cache/emoe_kernels``, in a folder named after a digest of
the sources, the torch release, the C library and the processor's vector instructions, so that a change of any of them
compiles anew and a home directory may be shared by different machines. Processes that need it at the same time wait for
the one that compiles.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).parent / "csrc"
_LIBRARY = "emoe_cpu.so"
_COMPILER_FLAGS = ("-O3", "-march=native", "-fopenmp", "-Wno-ignored-attributes")
_CAPABILITIES = {  # at::vec's names of what csrc/wide.h tells apart → the processor's features that they need
    "AVX512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "AVX2": ("avx2", "fma", "f16c"),
}

_lock = threading.Lock()
_loaded = False
_failure: str | None = None


class Status(NamedTuple):
    """Whether the compiled kernels can be used."""

    available: bool
    """They are loaded, lie compiled on disk, or will be compiled on first use."""
    detail: str
    """One line: which of these, or why not."""
    path: Path | None
    """Where the library lies or will lie; None if this machine cannot have one."""


@functools.cache
def features() -> frozenset[str]:
    """The processor's features as Linux names them ("avx512_bf16", "amx_bf16", ...); empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":", 1)[1] for line in lines if line.startswith("flags")), "").split())


def compiler() -> str | None:
    """The path of the C++ compiler, ``$CXX`` or c++, or None."""
    command = shlex.split(os.environ.get("CXX") or "c++")  # such as "ccache g++"
    return shutil.which(command[0]) if command else None


def _cache() -> Path:
    return Path(os.environ.get("EMOE_KERNELS_CACHE") or "~/.cache/emoe_kernels").expanduser().absolute()


def _capability() -> str | None:
    """The first of `_CAPABILITIES` that this processor has."""
    return next((name for name, needed in _CAPABILITIES.items() if features().issuperset(needed)), None)


def _compiler_flags() -> list[str]:
    """Those of this processor. AVX-512 is switched off by name where it is incomplete: wide.h asks the compiler."""
    name = _capability()
    narrow = ["-mno-avx512f"] if name == "AVX2" else []
    return [*_COMPILER_FLAGS, *narrow, f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}"]


@functools.cache
def _digest() -> str:
    vector = sorted(name for name in features() if name.startswith(("avx", "amx", "fma", "bmi")))
    digest = hashlib.sha256(repr((torch.__version__, platform.libc_ver(), _compiler_flags(), vector)).encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def _unsupported() -> str | None:
    """Why no compiler could help, or None."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"the C++ kernels are written for x86-64 Linux, not {platform.machine()} {sys.platform}"
    if _capability() is None:
        missing = [feature for feature in _CAPABILITIES["AVX2"] if feature not in features()]
        return f"the C++ kernels need AVX2 and FMA; this processor lacks {', '.join(missing)}"
    release = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if release < (2, 8):  # older wheels bring an OpenMP runtime that a library of ours cannot share
        return f"the C++ kernels need torch 2.8 or newer, this is {torch.__version__}"
    return None


def status() -> Status:
    """Whether the compiled kernels can be used, and why. Compiles and loads nothing."""
    reason = _unsupported()
    if reason:
        return Status(False, reason, None)
    try:
        path = _cache() / _digest() / _LIBRARY
        compiled = path.exists()
        foreign = _foreign(path) if compiled else None
    except (OSError, RuntimeError) as error:  # no home directory, or somebody else's
        return Status(False, f"no folder for the C++ kernels ({error}); set EMOE_KERNELS_CACHE", None)
    if _loaded:
        return Status(True, "the C++ kernels are loaded", path)
    if _failure:
        return Status(False, _failure, path)
    if foreign:
        return Status(False, f"the C++ kernels are not loaded: {foreign}", path)
    if compiled:
        return Status(True, "the C++ kernels have been compiled", path)
    if compiler() is None:
        wanted = f"$CXX is {os.environ['CXX']!r}, no" if os.environ.get("CXX") else "the C++ kernels need a C++"
        return Status(False, f"{wanted} compiler, once (on Debian: apt-get install g++)", path)
    return Status(True, "the C++ kernels will be compiled on first use, in about a minute", path)


def _foreign(path: Path) -> str | None:
    """Why this library is not ours to load: somebody else could have written it."""
    for part in (path.parent, path):
        found = part.stat()
        if found.st_uid not in (os.getuid(), 0) or found.st_mode & 0o022:
            return f"others than you can write to {part}"
    return None


def load() -> bool:
    """Make ``torch.ops.emoe_cpu`` available, compiling it if need be. False, after one warning, if that cannot be."""
    global _loaded, _failure
    with _lock:
        if _loaded or _failure:
            return _loaded
        found = status()
        _failure = None if found.available else found.detail
        if not _failure:
            try:
                _load_or_compile(found.path)
                _loaded = True
            except Exception as error:  # compilers, ninja and the loader fail in their own ways
                _failure = _explain(error, found.path)
                if isinstance(error, OSError) and not found.path.parent.is_dir():
                    _failure += "; set EMOE_KERNELS_CACHE to a folder that can be written"
        if _failure:
            logger.warning("%s; what they are for runs in plain PyTorch, which is slower", _failure)
        return _loaded


def _load_or_compile(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(path.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when this process ends, however it ends
        if path.exists():
            try:
                return torch.ops.load_library(str(path))
            except OSError as error:  # cut short, or of a machine that resembles this one too much
                logger.warning("the compiled C++ kernels do not load and are compiled again: %s", error)
                path.unlink()
        _compile(path)


def _explain(error: Exception, path: Path) -> str:
    """One line, with the rest in a file beside the library if it can be written."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if len(lines) == 1:
        return f"the C++ kernels could not be built: {lines[0]}"
    try:
        log = path.parent / "build.log"
        log.write_text("\n".join(lines) + "\n")
    except OSError:
        return f"the C++ kernels could not be built: {lines[0]}"
    return f"the C++ kernels could not be built; the compiler's output is in {log}"


def _compile(path: Path) -> None:
    """Compile beside `path`, load, then rename: an interrupted build leaves nothing that could be loaded."""
    from torch.utils import cpp_extension  # takes a second to import

    for rest in path.parent.glob("build-*"):  # of a build that was killed; we hold the lock
        shutil.rmtree(rest, ignore_errors=True)
    print("emoe_kernels: compiling the C++ kernels, once for this machine ...", file=sys.stderr, flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder, _ninja_on_path():
        cpp_extension.load(
            "emoe_cpu",
            [str(source) for source in sorted(_SOURCES.glob("*.cpp"))],
            extra_cflags=_compiler_flags(),
            extra_ldflags=["-fopenmp"],
            build_directory=folder,
            is_python_module=False,
        )
        os.replace(Path(folder) / _LIBRARY, path)
    print(f"emoe_kernels: compiled in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """The package `ninja` puts its program into the environment's bin, which need not be on the PATH."""
    before = os.environ.get("PATH")
    try:
        import ninja

        os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + (before or "")
    except ImportError:
        pass  # then torch looks for one on the PATH, and says so if there is none
    try:
        yield
    finally:
        if before is not None:
            os.environ["PATH"] = before


if __name__ == "__main__":
    load()
    print(status().detail)
