"""From what a user wrote after ``--model`` to a local folder.

The roads, tried in this order: a local folder; a ``.gguf`` file; an alias that a package ships (before the hub, because
its checksum is pinned here); an alias or ``org/name`` on the hub, through huggingface_hub and its cache.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emoe.assets.aliases import ALIASES, Alias
from emoe.assets.gguf import cached_gguf, gguf_folder
from emoe.assets.hub import download, is_cached
from emoe.assets.iglm import import_iglm
from emoe.assets.manifest import discard, is_intact
from emoe.assets.packages import fetch_package, require_licence
from emoe.bytecount import ByteCount, Show
from emoe.errors import UserError, nearest
from emoe.runtime import cache_home, sha256_file

Progress = Callable[[str], None]

_LOCAL = ("/", ".", "~")
"""How names start that are no hub's."""
_HUB_ID = r"[\w.-]+/[\w.-]+"


@dataclass(frozen=True)
class Resolved:
    """A model folder that can be read now."""

    folder: Path
    """Holds config.json, ``*.safetensors`` and the tokenizer."""
    source: str
    """One line of origin with a digest or commit, for provenance records."""
    kind: str
    """``folder``, ``gguf``, ``package`` or ``hub``."""
    licence: str | None
    """Licence of the weights where this table knows it."""


@dataclass(frozen=True)
class ModelRow:
    """One line of ``emoe models``."""

    alias: str
    hub_id: str | None
    family: str
    parameters: int
    licence: str
    package: str | None
    """``name version`` of the package that ships it; None when only the hub has it."""
    cached: bool
    """Usable now without the network."""
    gated: bool
    """The hub asks for a login and an accepted licence."""
    needs_acceptance: bool
    """Fetched only with ``--accept-license``."""


def resolve_model(
    name: str,
    *,
    accept_license: bool = False,
    token: str | None = None,
    revision: str | None = None,
    verify: bool = False,
    progress: Progress | None = None,
    show: Show | None = None,
) -> Resolved:
    """A local folder for ``name``, fetched or converted on first use and cached after.

    Args:
        name: folder, ``.gguf`` file, alias (`ALIASES`) or hub id ``org/name``.
        accept_license: consent to a restricted licence (``--accept-license``).
        token: hub token; None uses ``HF_TOKEN`` or the stored login.
        revision: hub branch, tag or commit; with it, an alias goes to the hub even if a package ships it.
        verify: compare the sha256 of cached package files, not only their sizes.
        progress: called with one line when something slow starts.
        show: told how far fetching and checking are, in MiB; without it, the hub's client has bars of its own.

    Raises:
        UserError: no or unknown name, unreachable or gated hub, licence not accepted, failed download or checksum.
    """
    if not name:
        raise UserError("--model: missing; give an alias (see `emoe models`), a folder, a .gguf file or a hub id")
    path = Path(os.path.expanduser(name))
    if path.is_dir() and (path / "config.json").is_file():
        return Resolved(path, f"folder {path.resolve()}", "folder", None)
    if path.is_file() and path.suffix.lower() == ".gguf":
        digest = sha256_file(path, ByteCount(show, "reading", path.stat().st_size))
        folder = cached_gguf(path, sha256=digest, verify=verify, progress=progress, show=show)
        return Resolved(folder, f"gguf {path.name} sha256 {digest}", "gguf", None)
    alias = ALIASES.get(name.lower())
    if alias is not None:
        if alias.package is not None and (revision is None or alias.hub_id is None):
            return _from_package(alias, accept_license, verify, progress, show)
        return _from_hub(alias.name, alias.hub_id, alias, token, revision, progress, show)
    if path.is_file():
        raise UserError(f"--model: {name} is a file but not a .gguf; pass the folder that holds config.json")
    if path.is_dir():
        inside = next(iter(sorted(path.glob("*.gguf"))), None)
        hint = f"; pass {inside}" if inside else "; a model folder holds config.json and *.safetensors"
        raise UserError(f"--model: the folder {name} has no config.json{hint}")
    if name.startswith(_LOCAL) or path.suffix.lower() == ".gguf" or name.count("/") > 1:
        raise UserError(f"--model: {name} does not exist")
    if re.fullmatch(_HUB_ID, name):
        known = next(
            (entry for entry in ALIASES.values() if entry.hub_id and entry.hub_id.lower() == name.lower()), None
        )
        return _from_hub(name, name, known, token, revision, progress, show)
    raise UserError(
        f"--model: unknown model '{name}'{nearest(name.lower(), ALIASES)}; "
        "a local folder, a .gguf file or a hub id org/name works too (`emoe models` lists the aliases)"
    )


def check_name(name: str) -> None:
    """Raise as `resolve_model` does for what names no model; nothing is fetched or converted."""
    path = Path(os.path.expanduser(name))
    is_gguf = path.suffix.lower() == ".gguf"
    on_hub = re.fullmatch(_HUB_ID, name) and not (path.exists() or is_gguf or name.startswith(_LOCAL))
    if not (on_hub or name.lower() in ALIASES or (is_gguf and path.is_file())):
        resolve_model(name)  # a folder is found, all else complained of


def _from_hub(
    name: str,
    hub_id: str,
    alias: Alias | None,
    token: str | None,
    revision: str | None,
    progress: Progress | None,
    show: Show | None,
) -> Resolved:
    gated = bool(alias and alias.gated)
    folder = download(name, hub_id, gated=gated, token=token, revision=revision, progress=progress, show=show)
    # The snapshot folder is named after the commit, which says more than the branch that was asked for.
    return Resolved(folder, f"hub {hub_id}@{folder.name}", "hub", alias.licence if alias else None)


def _from_package(
    alias: Alias, accept_license: bool, verify: bool, progress: Progress | None, show: Show | None
) -> Resolved:
    asset = alias.package
    assert asset is not None
    source = f"package {asset.label} sha256 {asset.sha256}"
    require_licence(asset, accept_license)
    folder = _package_folder(alias)
    if alias.prepare == "folder" or not is_intact(folder, verify=verify, show=show):
        fetched = fetch_package(asset, accept_license=accept_license, verify=verify, progress=progress, show=show)
        member = fetched / alias.member
        if alias.prepare == "gguf":
            cached_gguf(member, sha256=asset.members[alias.member], verify=verify, progress=progress, show=show)
        elif alias.prepare == "iglm":
            if folder.exists():
                discard(folder)
            licence_file = fetched / next(name for name in asset.members if "LICENSE" in name)
            import_iglm(member, folder, licence_file=licence_file, source=source)
    return Resolved(folder, source, "package", alias.licence)


def _package_folder(alias: Alias) -> Path:
    """Where the usable folder of a packaged alias is, or will be."""
    asset = alias.package
    assert asset is not None
    if alias.prepare == "gguf":
        digest = asset.members[alias.member]
        assert digest, "a packaged GGUF is pinned by its own digest, which names its cache folder"
        return gguf_folder(digest)
    if alias.prepare == "iglm":
        return cache_home() / "prepared" / f"{alias.name}-{asset.version}"
    return asset.folder / alias.member


def list_models() -> list[ModelRow]:
    """Every alias with what a user wants to know before choosing; touches the disk, never the network."""
    rows = []
    for alias in ALIASES.values():
        asset = alias.package
        if asset is None:
            cached = is_cached(alias.hub_id or "")
        else:
            cached = is_intact(asset.folder if alias.prepare == "folder" else _package_folder(alias))
        rows.append(
            ModelRow(
                alias=alias.name,
                hub_id=alias.hub_id,
                family=alias.family,
                parameters=alias.parameters,
                licence=alias.licence,
                package=asset.label if asset else None,
                cached=cached,
                gated=alias.gated,
                needs_acceptance=bool(asset and asset.needs_acceptance),
            )
        )
    return rows
