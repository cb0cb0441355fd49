"""How differently domains use modules: heat maps for several models side by side.

By default SmolLM2 cut by co-activation, with and without the refinement that `emoe convert` adds, against random cuts,
each with a gate fitted to its own experts. Others are named, such as a ModuleFormer trained with the mutual-information
loss and one balanced by the Switch loss. Measured on text that `emoe pretrain` holds out.

    python scripts/modularity.py --output docs/results/modularity_smollm2.json
    python scripts/modularity.py --models mi=runs/mi switch=runs/switch --output docs/results/modularity_mf.json
    python scripts/modularity.py --tokens 512 --calibration-tokens 2048 …   # a minute
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from stages import Stages, check_pretraining, figure, footer, save, settings_of

from emoe.analysis.analyze import analyze
from emoe.config import AnalyzeConfig
from emoe.report.usage import heat_map, write_usage
from emoe.runtime import write_text

DOMAINS = ("fiction", "essays", "computing", "definitions", "python", "german", "french")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="*", default=[], help="NAME=FOLDER of models with experts")
    parser.add_argument("--model", default="smollm2-135m", help="dense model to cut, if no --models are named")
    parser.add_argument("--split", type=int, default=64, help="experts to cut it into")
    parser.add_argument("--top-k", type=int, default=16, help="experts a token uses")
    parser.add_argument("--random-seeds", type=int, nargs="+", default=[0, 1, 2], help="of the random cuts")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--domains", nargs="+", default=[f"{name}=corpus:{name}" for name in DOMAINS])
    parser.add_argument("--tokens", type=int, default=16384, help="of each domain")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--work", type=Path, default=Path("/tmp/emoe-modularity"), help="goes on there")
    parser.add_argument("--output", type=Path, default=Path("docs/results/modularity_smollm2.json"))
    arguments = parser.parse_args()

    models = {name: Path(folder) for name, _, folder in (item.partition("=") for item in arguments.models)}
    for folder in models.values():
        check_pretraining(folder)
    stages = Stages(arguments.work, settings_of(arguments, models.values() or [arguments.model]))
    settings = {
        "experts": arguments.split,
        "top_k": arguments.top_k,
        "calibration_tokens": arguments.calibration_tokens,
        "routing": "top-k",
        "allocation": "uniform",
    }
    for name, cut in _cuts(arguments.random_seeds).items() if not models else ():
        models[name] = stages.converted(arguments.model, name, **settings, **cut)
    texts = list(stages.texts(dict(item.split("=", 1) for item in arguments.domains)))
    reports = {}
    for name, folder in models.items():
        report = stages.folder / f"report {name}"
        if not report.exists():
            config = AnalyzeConfig(
                model=str(folder),
                output=str(report),
                domains=[f"{domain}={path}" for domain, path in zip(texts, stages.held(texts), strict=True)],
                tokens=arguments.tokens,
                sequence_length=arguments.sequence_length,
                knock_out=0,
                resume=True,
            )
            analyze(config, lambda stage, done, total: None, write_usage)
        reports[name] = json.loads((report / "usage.json").read_text(encoding="utf-8"))
    result = {
        **stages.origin(),
        "settings": {k: str(v) for k, v in vars(arguments).items() if k not in ("work", "output")},
    }
    result |= {"domains": texts, "models": {name: _facts(report) for name, report in reports.items()}}
    write_text(arguments.output, json.dumps(result, indent=1) + "\n")
    write_text(arguments.output.with_suffix(".md"), markdown(result))
    plot(result, arguments.output.with_suffix(".png"))
    print(markdown(result))


def _cuts(seeds: list[int]) -> dict[str, dict[str, Any]]:
    """Settings of `emoe convert` by name. Refinement moves neurons towards what the gate can tell apart, so that only
    cuts without it differ in the clustering alone."""
    found = {"coactivation": {"split": "coactivation", "refine_rounds": 0}}
    found["coactivation, refined"] = {"split": "coactivation"}
    return found | {f"random {seed}": {"split": "random", "refine_rounds": 0, "seed": seed} for seed in seeds}


def _facts(report: dict[str, Any]) -> dict[str, Any]:
    layers = report.get("neurons", {}).get("layers", [])
    kept = {"neurons": sum(r["neurons"] for r in layers), "experts": sum(r["experts"] for r in layers)}
    return {"divergence": report["divergence"], "information": kept if layers else None}


def _mean(table: list[list[float]]) -> float:
    """Over pairs of different domains."""
    values = np.array(table)
    return values.sum() / (values.size - len(values))


def markdown(result: dict[str, Any]) -> str:
    """A row a model and kind of module."""
    lines = [
        f"Mean over pairs of {len(result['domains'])} domains ({', '.join(result['domains'])}) and over layers, nats. "
        "Kept: what experts tell of the domain over what their neurons tell, by energies.",
        "",
        "| | modules | KL | Jensen–Shannon | kept |",
        "|---|---|---:|---:|---:|",
    ]
    for name, facts in result["models"].items():
        for kind, found in facts["divergence"].items():
            told = facts["information"]
            kept = f"{told['experts'] / told['neurons']:.3f}" if told and kind == "ffn" else ""
            lines.append(f"| {name} | {kind} | {_mean(found['kl']):.4f} | {_mean(found['js']):.4f} | {kept} |")
    return "\n".join([*lines, footer(result)])


def plot(result: dict[str, Any], path: Path) -> None:
    """KL heat maps, a column a model, a row a kind of module."""
    models = result["models"]
    kinds = sorted({kind for facts in models.values() for kind in facts["divergence"]})
    side = 1.8 + 0.55 * len(result["domains"])
    made = figure(side * len(models), side * len(kinds))
    for row, kind in enumerate(kinds):
        for column, (name, facts) in enumerate(models.items()):
            if kind in facts["divergence"]:
                axes = made.add_subplot(len(kinds), len(models), row * len(models) + column + 1)
                heat_map(axes, facts["divergence"][kind]["kl"], result["domains"], f"{name}, {kind}: KL, nats")
    save(made, path)


if __name__ == "__main__":
    main()
