"""Write a changed copy of a checkpoint, one weight file in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from emoe.checkpoint.companions import copy_companions
from emoe.checkpoint.digests import write_digests
from emoe.checkpoint.given import given_output
from emoe.checkpoint.reader import shard_map, stored_bytes
from emoe.checkpoint.writer import ShardWriter
from emoe.conversion.workspace import Workspace
from emoe.distributed import Group
from emoe.errors import UserError
from emoe.modeling.auto import emoe_config_class, stock_config_class
from emoe.modeling.configuration_moduleformer import ModuleFormerConfig
from emoe.runtime import format_bytes, require_space, write_text

Progress = Callable[[str, int, int], None]
Say = Callable[[str], None]
"""Called with a line before something slow or large."""
Edit = Callable[[str, torch.Tensor], "tuple[str, torch.Tensor] | None"]
"""(name, tensor) → its new name and content, or None to leave it out."""


@dataclass(frozen=True)
class Sizes:
    """What a checkpoint weighs."""

    parameters: int
    """Entries of all tensors but gate tables."""
    bytes: int
    """Of the weight files."""


def sizes_of(folder: Path) -> Sizes:
    """From the files' headers alone."""
    shards = shard_map(folder)
    count = 0
    for path in sorted(set(shards.values())):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                if ".router." not in name:
                    count += torch.Size(file.get_slice(name).get_shape()).numel()
    return Sizes(count, sum(path.stat().st_size for path in set(shards.values())))


def bytes_after(source: Path, scale: dict[str, float]) -> int:
    """Bytes of the weight files of ``source`` when tensors are ``scale`` times as large, by name."""
    shards = shard_map(source)
    total = sum(path.stat().st_size for path in set(shards.values()))
    for path in set(shards.values()):
        with safe_open(path, framework="pt") as file:
            total += sum((scale[n] - 1) * stored_bytes(file.get_slice(n), n) for n in file.keys() if n in scale)  # noqa: SIM118
    return round(total)


def require_room(source: Path, output: str, scale: dict[str, float], say: Say) -> None:
    """Say what a copy of ``source`` will weigh, its tensors scaled as for `bytes_after`.

    Raises:
        UserError: the disk of ``output`` has less.
    """
    needed, place = bytes_after(source, scale), Path(output).absolute().parent
    say(f"disk: {format_bytes(needed)} needed in {place}")
    require_space(place, needed, "--output")


def workspace_of(source: Path, output: str, *, overwrite: bool) -> Workspace:
    """Where ``output`` is written; `UserError` if none is named."""
    return Workspace(given_output(output), source, resume=False, overwrite=overwrite)


def rewrite(
    source: Path,
    output: str,
    edit: Edit,
    config: dict[str, Any],
    companions: Callable[[Path], None],
    report: dict[str, Any],
    *,
    scale: dict[str, float] | None = None,
    overwrite: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Write ``output`` from ``source``: every tensor edited, this config.json, further files by ``companions(folder)``.

    Args:
        source: the checkpoint.
        output: folder to write.
        edit: what becomes of each tensor.
        config: config.json.
        companions: writes further files.
        report: what was done; its "verb" names its file.
        scale: size of a tensor in the output over that in the source, by name; 1 where it is not named.
        overwrite: whether an output of ours may be replaced.
        progress: called with (stage, done, total).

    Returns:
        ``report`` with the sizes before and after; it lies in the output as ``emoe_{report["verb"]}.json``.

    Raises:
        UserError: no output named, something in its way, weights that are no numbers, or a config.json that would not
            load.
    """
    from emoe.report.card import write_history_card

    workspace = workspace_of(source, output, overwrite=overwrite)
    _check_config(config)
    before = sizes_of(source)
    with workspace.open(Group()):
        try:
            require_space(workspace.output.parent, bytes_after(source, scale or {}), "--output")
            digests = _write_weights(source, workspace.folder, edit, progress)
            _write_files(source, workspace.folder, config, companions)
            after = sizes_of(workspace.folder)
            report = report | {
                "parameters": {"before": before.parameters, "after": after.parameters},
                "bytes": {"before": before.bytes, "after": after.bytes},
            }
            write_text(
                workspace.folder / f"emoe_{report['verb']}.json", json.dumps(report, indent=2, allow_nan=False) + "\n"
            )
            write_history_card(workspace.folder, source, report)
            write_digests(workspace.folder, digests)
            workspace.publish()
        except BaseException:
            workspace.abandon()
            raise
    return report


def _check_config(config: dict[str, Any]) -> None:
    """Raise `UserError` for a config.json that transformers would refuse to load."""
    kind = config["model_type"]
    try:
        if kind == "moduleformer":
            ModuleFormerConfig.from_dict(config)
        else:
            (emoe_config_class(kind[5:]) if kind.startswith("emoe_") else stock_config_class(kind)).from_dict(config)
    except Exception as error:  # transformers raises many kinds for a bad config.json
        problem = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"--output: the result would not load ({problem}); ask for something else") from None


def _write_weights(source: Path, target: Path, edit: Edit, progress: Progress) -> dict[str, str]:
    """Every weight file, edited; digests by file name."""
    shards = shard_map(source)
    files = sorted(set(shards.values()))
    writer = ShardWriter(target, len(files))
    for number, path in enumerate(files):
        progress("writing", number, len(files))
        with safe_open(path, framework="pt") as file:
            edited = (
                edit(name, _sound(name, file.get_tensor(name)))
                for name in sorted(file.keys())
                if shards.get(name) == path
            )
            writer.write(number, dict(item for item in edited if item is not None))
    writer.finish()
    progress("done", len(files), len(files))
    return writer.digests


def _sound(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor; `UserError` if it holds NaN or infinity. A router's thresholds may be infinite."""
    if tensor.is_floating_point():
        broken = tensor.isnan() if ".router." in name else ~tensor.isfinite()
        if broken.any():
            raise UserError(
                f"--model: tensor {name} holds NaN or infinite values, this checkpoint is broken; make it again"
            )
    return tensor


def _write_files(source: Path, target: Path, config: dict[str, Any], companions: Callable[[Path], None]) -> None:
    copy_companions(source, target)
    companions(target)
    write_text(target / "config.json", json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n")
