"""Text that comes inside Debian packages: fetched with apt, unpacked with dpkg, none of their scripts ever run.

apt checks a package against the archive's signed index. What was unpacked is cached as
``$EMOE_HOME/assets/debian-NAME/`` with a `manifest.json` of the version, sizes and digests.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from emoe.assets.manifest import discard, is_intact, write_manifest
from emoe.assets.packages import Progress
from emoe.errors import UserError
from emoe.runtime import atomic_directory, cache_home, sha256_file


def fetch_debian(name: str, pattern: str, *, progress: Progress | None = None) -> Path:
    """The cached folder of a Debian package, fetched first when it is missing or damaged.

    Args:
        name: of the package, in whatever version the machine's archive offers.
        pattern: glob below the package's root; only files that match are kept, under their own paths.
        progress: called with one line when something slow starts.

    Raises:
        UserError: apt or dpkg are missing or fail, or nothing matches the pattern.
    """
    folder = cache_home() / "assets" / f"debian-{name}"
    if is_intact(folder):
        return folder
    if folder.exists():
        discard(folder)
    if progress:
        progress(f"fetching the Debian package {name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as download:
        _run(["apt-get", "download", "--quiet", name], name, Path(download))
        archives = list(Path(download).glob("*.deb"))
        if len(archives) != 1:
            raise UserError(f"Debian package {name}: apt-get download left no archive; run apt-get update once")
        root = Path(download) / "root"
        _run(["dpkg", "-x", str(archives[0]), str(root)], name, Path(download))
        found = [path for path in sorted(root.glob(pattern)) if path.is_file() and not path.is_symlink()]
        if not found:
            raise UserError(f"Debian package {name}: {archives[0].name} holds nothing like {pattern}")
        with atomic_directory(folder) as temporary:
            for path in found:
                target = temporary / path.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            write_manifest(temporary, package=archives[0].name, client="apt", sha256=sha256_file(archives[0]))
    return folder


def _run(command: list[str], name: str, folder: Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=folder, check=False)
    except OSError as error:
        raise UserError(
            f"Debian package {name}: cannot run {command[0]} ({error.strerror}); give a text file of your own instead"
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"Debian package {name}: {command[0]} failed ({last}); check the network and apt's sources")
