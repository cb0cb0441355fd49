"""Tokens a second and memory of a ModuleFormer against dense models of equal total and of equal active parameters.

24 layers scaled down in width, 2 of 32 FFN experts and 2 of 16 attention experts, keys and values shared as in the
released models. The dense models are the same code without gates: every expert of a layer in one, with all the
parameters, or with those that a token uses. Speeds are medians over rounds that take the models in turn; memory is
each model's peak in a process of its own, over that of a bare interpreter. Five minutes for each dtype on two idle
cores; the files are written anew after each mode.

    python scripts/bench_moduleformer.py --output docs/results/bench_moduleformer.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import emoe
from emoe.moduleformer.sizes import count_parameters
from emoe.runtime import format_bytes, peak_memory, processor, write_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("prefill", "decode", "train")
TOKENS = {"prefill": 4 * 512, "decode": 4, "train": 4 * 512}
"""Tokens of one timed call: four sequences."""


def architecture(width: int, layers: int) -> dict[str, dict[str, Any]]:
    """Three models by name."""
    common = {"vocab_size": 4096, "n_embd": width, "n_layer": layers, "att_hidden": width, "n_head": 1}
    common |= {"gating_size": width // 4, "bos_token_id": 0, "eos_token_id": 0}
    F, E, attention_E, K = 2 * width, 32, 16, 2
    dense = {"gate_type": "all", "n_mlp_experts": 1, "k_mlp": 1}
    return {
        "ModuleFormer": common | {"ffd_hidden": F, "n_att_experts": attention_E, "n_mlp_experts": E},
        "dense, equal total": common
        | dense
        | {"ffd_hidden": E * F, "n_att_experts": attention_E, "k_att": attention_E},
        "dense, equal active": common | dense | {"ffd_hidden": K * F, "n_att_experts": K, "k_att": K},
    }


def build(fields: dict[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(0)
    return emoe.ModuleFormerForCausalLM(emoe.ModuleFormerConfig(**fields)).to(dtype)


def task(model: torch.nn.Module, mode: str) -> Callable[[], None]:
    """One call: 4 sequences of 512 tokens, a further token of each with 512 in the cache, or a training step."""
    ids_BT = torch.randint(4096, (4, 512), generator=torch.Generator().manual_seed(1))
    if mode == "train":
        model.train()

        def step() -> None:
            model(ids_BT, labels=ids_BT).loss.backward()
            model.zero_grad(set_to_none=True)

        return step
    model.eval()

    @torch.no_grad()
    def prefill() -> None:
        model(ids_BT, use_cache=True, logits_to_keep=1)

    if mode == "prefill":
        return prefill
    with torch.no_grad():
        cache = model(ids_BT, use_cache=True).past_key_values

    @torch.no_grad()
    def decode() -> None:
        model(ids_BT[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=128, help="D; FFN experts are twice as wide")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON, and a table beside it")
    parser.add_argument("--memory", nargs=3, metavar=("MODEL", "MODE", "DTYPE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    models = architecture(arguments.width, arguments.layers)
    if arguments.memory:
        name, mode, dtype = arguments.memory
        if name != "bare":
            task(build(models[name], DTYPES[dtype]), mode)()
        print(peak_memory())
        return
    result = {
        "command": " ".join(["python", *sys.argv]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "hardware": f"{processor()}, {torch.get_num_threads()} threads",
        "rows": [],
    }
    bare = memory("bare", "none", "none", arguments)
    for dtype in arguments.dtypes.split(","):
        for mode in MODES:
            result["rows"] += measure(models, dtype, mode, bare, arguments)
            if arguments.output:
                write_text(arguments.output, json.dumps(result, indent=1) + "\n")
                write_text(arguments.output.with_suffix(".md"), markdown(result))
    print(markdown(result))


def measure(
    models: dict[str, dict[str, Any]], dtype: str, mode: str, bare: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row a model, speeds measured side by side."""
    built = {name: build(fields, DTYPES[dtype]) for name, fields in models.items()}
    seconds = times({name: task(model, mode) for name, model in built.items()}, arguments.rounds, f"{dtype} {mode}")
    rows = []
    for name, model in built.items():
        middle = statistics.median(seconds[name])
        rows.append({"model": name, "dtype": dtype, "mode": mode, "parameters": count_parameters(model)._asdict()})
        rows[-1]["tokens_per_second"] = round(TOKENS[mode] / middle)
        rows[-1]["spread"] = round((max(seconds[name]) - min(seconds[name])) / middle, 2)
        rows[-1]["memory_bytes"] = memory(name, mode, dtype, arguments) - bare
    return rows


def times(calls: dict[str, Callable[[], None]], rounds: int, title: str) -> dict[str, list[float]]:
    """Seconds of each call in each round; the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
        spent = ", ".join(f"{name} {found[-1]:.2f} s" for name, found in seconds.items())
        print(f"{title} {done}/{rounds}: {spent}", file=sys.stderr, flush=True)
    return {name: found[1:] for name, found in seconds.items()}


def memory(name: str, mode: str, dtype: str, arguments: argparse.Namespace) -> int:
    """Peak resident bytes of a process that builds one model and makes one call."""
    command = [sys.executable, __file__, "--width", str(arguments.width), "--layers", str(arguments.layers)]
    command += ["--memory", name, mode, dtype]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# ModuleFormer against dense models: tokens a second and memory",
        "",
        f"{result['hardware']}; commit {result['commit'][:7]}. `{result['command']}`",
        "",
        "| dtype | | model | parameters, active | tokens/s | spread | over equal total | over equal active | memory |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        same = {r["model"]: r for r in result["rows"] if (r["dtype"], r["mode"]) == (row["dtype"], row["mode"])}
        ratios = [
            f"{row['tokens_per_second'] / same[f'dense, equal {kind}']['tokens_per_second']:.2f}"
            for kind in ("total", "active")
        ]
        counts = row["parameters"]
        cells = [row["dtype"], row["mode"], row["model"]]
        cells += [f"{counts['total'] / 1e6:.1f} M, {counts['active'] / 1e6:.1f} M", f"{row['tokens_per_second']:,}"]
        cells += [f"{100 * row['spread']:.0f}%", *ratios, format_bytes(row["memory_bytes"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
