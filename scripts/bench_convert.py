"""Seconds and peak memory of `emoe convert`, a stage a row, and what a further layer costs.

SmolLM2 with the default settings, and checkpoints of the shape of Llama-2-7B with a few layers and made-up weights
(`make_checkpoint.py`), weights-only and calibrated. From the slope over the layers comes an estimate for the whole
model; `--full` converts all 32 layers for real. `emoe estimate` stands beside each run. Results: docs/results/.

    python scripts/bench_convert.py --smollm --layers 2,4,8 --calibrated 2,4 --full --output docs/results/convert.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from emoe.runtime import format_bytes, processor, write_text

WEIGHTS_ONLY = ["--split", "weights", "--gate", "average-key", "--held-out-tokens", "0"]
FULL_LAYERS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--like", default="llama2-7b", help="shape of the made-up checkpoints")
    parser.add_argument("--layers", default="2,4,8", help="numbers of layers, weights-only")
    parser.add_argument("--calibrated", default="2,4", help="numbers of layers with the default settings; '' for none")
    parser.add_argument("--full", action="store_true", help=f"also all {FULL_LAYERS} layers, weights-only")
    parser.add_argument("--smollm", action="store_true", help="also SmolLM2 with the default settings")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/emoe-bench"), help="for checkpoints; kept")
    parser.add_argument("--output", type=Path, help="write the runs here as JSON, and a table beside it")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)

    bare = bare_memory()
    numbers = lambda text: [int(n) for n in text.split(",") if n]  # noqa: E731
    runs = [measure("SmolLM2-135M", "smollm2-135m", [], arguments.folder)] if arguments.smollm else []
    for kind, flags, layers in (
        ("weights-only", WEIGHTS_ONLY, numbers(arguments.layers) + [FULL_LAYERS] * arguments.full),
        ("calibrated", [], numbers(arguments.calibrated)),
    ):
        for count in layers:
            checkpoint = make(arguments.like, count, arguments.folder)
            run = measure(f"{arguments.like}, {count} layers, {kind}", str(checkpoint), flags, arguments.folder)
            runs.append(run | {"kind": kind, "layers": count})
            show(runs[-1], bare)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "hardware": f"{processor()}, {os.cpu_count()} cores",
        "bare_bytes": bare,
        "slopes": slopes(runs),
        "runs": runs,
    }
    if arguments.output:
        write_text(arguments.output, json.dumps(result, indent=1) + "\n")
        write_text(arguments.output.with_suffix(".md"), markdown(result))
    print(markdown(result))


def bare_memory() -> int:
    """Peak resident bytes of an interpreter that has imported torch and a transformers model class."""
    code = (
        "import torch; from transformers import LlamaForCausalLM; from emoe.runtime import peak_memory as p; print(p())"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def make(like: str, layers: int, folder: Path) -> Path:
    """A checkpoint of that shape, made once."""
    checkpoint = folder / f"{like}-{layers}"
    if not checkpoint.exists():
        script = Path(__file__).with_name("make_checkpoint.py")
        command = [sys.executable, str(script), "--like", like, "--layers", str(layers), "--output", str(checkpoint)]
        subprocess.run(command, check=True)
    return checkpoint


def measure(name: str, model: str, flags: list[str], folder: Path) -> dict[str, Any]:
    """One conversion in a process of its own, and what `emoe estimate` says of it."""
    command = [sys.executable, "-m", "emoe"]
    estimate = subprocess.run(
        [*command, "estimate", "--model", model, "--experts", "64", *flags, "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "convert", "--model", model, "--experts", "64", *flags, "--output", str(folder / "out"),
         "--overwrite", "--json"],
        capture_output=True, text=True,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    report, predicted = json.loads(done.stdout), json.loads(estimate.stdout)
    return {
        "name": name,
        "seconds": round(seconds, 1),
        "peak_bytes": max(report["peak_bytes"].values()),
        "layer_bytes": predicted["layer_bytes"],
        "estimated_seconds": round(predicted["seconds"], 1),
        "estimated_bytes": predicted["memory_bytes"],
        "stages": {
            s: {"seconds": report["seconds"][s], "peak_bytes": report["peak_bytes"][s]} for s in report["seconds"]
        },
    }


def slopes(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds a layer between the shortest and the longest run of a kind, and the whole model's estimate from them."""
    found = {}
    for kind in ("weights-only", "calibrated"):
        mine = [run for run in runs if run.get("kind") == kind and run["layers"] < FULL_LAYERS]
        mine.sort(key=lambda run: run["layers"])
        if len(mine) > 1:
            first, last = mine[0], mine[-1]
            slope = (last["seconds"] - first["seconds"]) / (last["layers"] - first["layers"])
            whole = last["seconds"] + slope * (FULL_LAYERS - last["layers"])
            found[kind] = {"seconds_a_layer": round(slope, 2), "whole_model_seconds": round(whole)}
    return found


def show(run: dict[str, Any], bare: int) -> None:
    """The stages of a run on the terminal."""
    table = Table(title=f"{run['name']}: {run['seconds']} s (estimate {run['estimated_seconds']} s)")
    for heading in ("stage", "seconds", "peak over bare"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage, found in run["stages"].items():
        table.add_row(stage, f"{found['seconds']:.1f}", format_bytes(found["peak_bytes"] - bare))
    Console().print(table)


def markdown(result: dict[str, Any]) -> str:
    """The table for docs/results."""
    bare = result["bare_bytes"]
    lines = [
        f"Peak memory is resident, over that of a bare interpreter with torch and transformers ({format_bytes(bare)}).",
        "",
        "| | seconds | `emoe estimate` | peak memory | two layers |",
        "|---|---:|---:|---:|---:|",
    ]
    for run in result["runs"]:
        lines.append(
            f"| {run['name']} | {run['seconds']:.0f} | {run['estimated_seconds']:.0f} | "
            f"{format_bytes(run['peak_bytes'] - bare)} | {format_bytes(2 * run['layer_bytes'])} |"
        )
    lines += ["", "Seconds a stage:", ""]
    stages = list(dict.fromkeys(stage for run in result["runs"] for stage in run["stages"]))
    lines += ["| | " + " | ".join(stages) + " |", "|---" + "|---:" * len(stages) + "|"]
    for run in result["runs"]:
        cells = (run["stages"].get(stage) for stage in stages)
        lines.append(f"| {run['name']} | " + " | ".join(f"{c['seconds']:.1f}" if c else "" for c in cells) + " |")
    lines.append("")
    for kind, slope in result["slopes"].items():
        lines.append(
            f"{kind.capitalize()}: {slope['seconds_a_layer']} s a further layer, so "
            f"{slope['whole_model_seconds'] / 60:.1f} minutes for {FULL_LAYERS} layers."
        )
    lines += ["", f"`{result['command']}`, commit {result['commit'][:12]}, {result['hardware']}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
