"""The files of a converted checkpoint that are not weights: config, code, tokenizer, settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import emoe
from emoe.calibration.text import TokenBlocks
from emoe.checkpoint.companions import copy_companions
from emoe.checkpoint.converted import SOURCE_S
from emoe.conversion.layer import ORACLE
from emoe.conversion.plan import Plan
from emoe.runtime import atomic_write, write_text

SETTINGS = "emoe_config.yaml"
"""Every setting of the conversion, as a file for ``--config``."""


def emoe_fields(plan: Plan, provenance: dict[str, Any]) -> dict[str, Any]:
    """What our config.json holds beyond and instead of the source's."""
    from emoe.modeling.auto import auto_map

    raw, spec = plan.reader.raw_config, plan.reader.spec
    return {
        "model_type": f"emoe_{spec.model_type}",
        "architectures": [f"EMoE{name}" for name in raw.get("architectures") or []],
        "auto_map": auto_map(spec.model_type),
        "num_experts": plan.config.experts,
        "num_experts_per_tok": plan.top_k,
        "emoe_layers": plan.layers,
        "emoe_gate": "average-key" if plan.config.gate == ORACLE else plan.config.gate,
        "emoe_routing": plan.routing,
        "emoe_allocation": plan.allocation,
        "emoe_shared_experts": plan.config.shared_experts,
        "emoe_compensation": plan.top_k if plan.config.compensate else 0,
        "emoe_ffn": spec.layout(),
        # Not under the name "model_type": transformers would take this for a nested configuration of that type.
        "emoe_source": {"family": spec.model_type, "architectures": raw.get("architectures")},
        "emoe_provenance": provenance,
    }


def emoe_config(plan: Plan) -> Any:
    """Configuration object for layers under conversion."""
    from emoe.modeling.auto import emoe_config_class

    fields = {k: v for k, v in emoe_fields(plan, {}).items() if k not in ("model_type", "auto_map")}
    return emoe_config_class(plan.reader.spec.model_type)(**{**plan.reader.config.to_dict(), **fields})


def provenance(plan: Plan, digest: str, blocks: TokenBlocks | None) -> dict[str, Any]:
    """Who made this and from what; nothing in it changes when the same conversion is run again."""
    c = plan.config
    return {
        "emoe_version": emoe.__version__,
        "source": plan.origin,
        "source_digest": digest,
        "licence": plan.licence,
        "split": {"method": c.split, "reference": plan.split.reference, "assignment": c.assignment}
        | {"features": c.features, "refine_rounds": plan.refine_rounds},
        "gate": {"method": c.gate, "reference": plan.gate.reference, "prefix": plan.prefix},
        "outputs": "refitted by least squares" if c.refit_outputs else SOURCE_S,
        "calibration": {
            "sources": [Path(source).name if Path(source).exists() else source for source in c.calibration],
            "tokens": int(blocks.calibration.numel()) if blocks else 0,
            "digest": blocks.digest if blocks else None,
        },
        "seed": c.seed,
    }


def write_companions(plan: Plan, folder: Path, source_digest: str, blocks: TokenBlocks | None) -> None:
    """Everything beside weights, partition and report."""
    from emoe.modeling.modeling_emoe import code_files

    config = plan.reader.raw_config | emoe_fields(plan, provenance(plan, source_digest, blocks))
    copy_companions(plan.reader.folder, folder)
    for file in code_files():
        with atomic_write(folder / file.name) as temporary:
            shutil.copyfile(file, temporary)
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_text(folder / SETTINGS, plan.config.to_yaml())
