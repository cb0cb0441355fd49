"""What pruning of modules is compared with: dropping layers, and structured pruning of neurons by magnitude.

Legend: N tokens, F neurons, L layers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from emoe.checkpoint.companions import source_config
from emoe.checkpoint.partition import NAME as PARTITION
from emoe.checkpoint.reader import shard_map
from emoe.config import PruneConfig
from emoe.errors import UserError
from emoe.families.neurons import neuron_axis
from emoe.surgery.budget import settle_budget
from emoe.surgery.converted import Converted
from emoe.surgery.history import entry, provenance_of, with_entry
from emoe.surgery.modules import Anatomy, Seen
from emoe.surgery.rewrite import Progress, rewrite
from emoe.surgery.selection import TIE, normalised
from emoe.surgery.usage import check_finite, fit_length, load_model, read_blocks, text_of


def layers_kept(total: int, keep: float, method: str) -> list[int]:
    """Numbers of the layers that stay: evenly spaced with the first and the last among them, or the first ones."""
    number = max(1, round(keep * total))
    if method == "layers-top":
        return list(range(number))
    return torch.linspace(0, total - 1, number).round().int().tolist() if number > 1 else [0]


def drop_layers(anatomy: Anatomy, config: PruneConfig, digests: dict[str, str], progress: Progress) -> dict[str, Any]:
    """Whole layers go; the rest are numbered anew.

    Args:
        anatomy: of the checkpoint.
        config: settings.
        digests: hex sha256 of its weight files by name, as far as they are known.
        progress: called with (stage, done, total).

    Raises:
        UserError: layers that cannot be numbered anew, none with modules left, or a K that is more than they have.
    """
    start, total = anatomy.layers()
    kept = layers_kept(total, config.keep, config.method)
    places = {old: new for new, old in enumerate(kept)}
    rebuilt = anatomy.with_layers(kept)
    left = {f"{places[s.layer]}.{s.kind}": s.groups for s in anatomy.sets() if s.layer in places}
    notes = settle_budget(anatomy, rebuilt, left, config.top_k)
    tables = anatomy.budget_tables()
    pattern = re.compile(rf"{re.escape(start)}(\d+)\.(.*)")

    def edit(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        found = pattern.fullmatch(name)
        if not found:
            return name, tensor
        layer = int(found[1])
        if name in tables:
            tensor = tensor[: rebuilt["num_experts"]]
        return (f"{start}{places[layer]}.{found[2]}", tensor) if layer in places else None

    def companions(target: Path) -> None:
        anatomy.write_companions(target, {})
        if isinstance(anatomy, Converted):
            partition = anatomy.partition
            partition.labels = {places[i]: labels for i, labels in partition.labels.items() if i in places}
            partition.digests = {places[i]: digest for i, digest in partition.digests.items() if i in places}
            partition.save(target / PARTITION)

    facts = config.model_dump(include={"method", "keep", "top_k"}, exclude_none=True)
    history = [*anatomy.history, entry("prune", anatomy.folder, digests, settings=facts, kept=kept)]
    report = {"verb": "prune", "model": config.model, "settings": facts, "layers": kept, "notes": notes}
    report["modules"] = {"before": sum(s.count for s in anatomy.sets()), "after": sum(map(sum, left.values()))}
    final = anatomy.with_history(rebuilt, history)
    found = {name: pattern.fullmatch(name) for name in shard_map(anatomy.folder)}
    gone = {name: 0.0 for name, match in found.items() if match and int(match[1]) not in places}
    return rewrite(
        anatomy.folder,
        config.output,
        edit,
        final,
        companions,
        report,
        scale=gone,
        overwrite=config.overwrite,
        progress=progress,
    )


def prune_neurons(anatomy: Anatomy, config: PruneConfig, digests: dict[str, str], progress: Progress) -> dict[str, Any]:
    """Neurons of least ‖w_down‖·mean|h| go until every layer has the same number; what is left is a stock dense model.

    Source: the norm of weights times activations as in Wanda (Sun et al. 2023, arXiv 2306.11695), summed over a neuron.
    """
    number = check_neurons(anatomy, config.keep)
    reader, raw = anatomy.reader, source_config(anatomy.config)
    score = _magnitudes(anatomy, config, progress)
    kept = {
        layer: (normalised(score_F, "max") / TIE).round().argsort(descending=True, stable=True)[:number].sort().values
        for layer, score_F in score.items()
    }
    roles = {name: (layer, *role) for layer in kept for name, role in reader.ffn_tensors(layer).items()}

    def edit(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        if ".router." in name:
            return None
        axis = neuron_axis(reader.spec, *roles[name][1:]) if name in roles else None
        if axis is None:
            return name, tensor
        index = kept[roles[name][0]]
        if reader.spec.fused and roles[name][1] == "up":
            index = torch.cat([index, index + tensor.shape[axis] // 2])
        return name, tensor.index_select(axis, index)

    facts = config.model_dump(include={"method", "keep", "text", "tokens", "seed"})
    raw[reader.spec.width_key(raw)] = number
    step = entry("prune", anatomy.folder, digests, settings=facts, kept=number)
    report = {"verb": "prune", "model": config.model, "settings": facts, "neurons": number}
    report["notes"] = ["a dense model", *fit_length(anatomy.folder, config.sequence_length)[1]]
    report["provenance"] = with_entry(provenance_of(anatomy.folder), step)
    return rewrite(
        anatomy.folder,
        config.output,
        edit,
        raw,
        lambda target: None,
        report,
        overwrite=config.overwrite,
        progress=progress,
    )


def check_neurons(anatomy: Anatomy, keep: float) -> int:
    """Neurons that each layer of the dense model has: a fraction of the layers' mean width.

    Raises:
        UserError: not a converted model, or not all of it; a layer that has fewer.
    """
    if not isinstance(anatomy, Converted):
        raise UserError("--method: magnitude works on converted models only")
    if len(anatomy.config["emoe_layers"]) != anatomy.reader.num_layers:
        raise UserError("--method: magnitude needs a model with all layers converted: a dense one has a single width")
    widths = [found.count * found.size for found in anatomy.sets()]
    number, least = max(1, round(keep * sum(widths) / len(widths))), min(widths)
    if number > least:
        raise UserError(
            f"--keep: {keep} of all neurons is {number} a layer, but a layer has only {least} left and a dense model "
            "has one width; keep fewer, or use `emoe export --to dense --pad`"
        )
    return number


@torch.no_grad()
def _magnitudes(anatomy: Converted, config: PruneConfig, progress: Progress) -> dict[int, torch.Tensor]:
    """‖w_down‖·Σ|h| of each neuron in the converted order, (F,) fp64, by layer; all experts on."""
    settings = {"length": config.sequence_length, "tokens": config.tokens, "seed": config.seed, "flag": "--text"}
    with text_of(config) as sources:
        blocks_BT = read_blocks(anatomy.folder, sources, **settings)
    model = load_model(anatomy.folder, head=False)
    model.set_top_k(model.config.num_experts)
    sums: dict[str, torch.Tensor] = {}

    def see(name: str, seen: Seen) -> None:
        check_finite(name, seen.hidden_NF)
        sums[name] = sums.get(name, 0) + seen.hidden_NF.abs().sum(0).double()

    with anatomy.watch(model, see, energies=True):
        for done, part_BT in enumerate(blocks_BT.split(config.batch_sequences)):
            progress("counting", done * config.batch_sequences, len(blocks_BT))
            model(part_BT)
    down = {layer: ffn.weight_views().down_DF for layer, ffn in model.sparse_ffns().items()}
    return {layer: sums[f"{layer}.ffn"] * matrix_DF.float().norm(dim=0) for layer, matrix_DF in down.items()}
