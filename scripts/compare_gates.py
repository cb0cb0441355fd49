"""Quality of every split and gate on one model, in one pass: the table behind the defaults of `emoe convert`.

Each pair of split and gate runs through all layers with its own stream of held-out text, one layer in memory at a time.
`oracle` looks at the activations and bounds what any gate can reach on its split. Results are committed under
docs/results/.

    python scripts/compare_gates.py --model smollm2-135m --output docs/results/compare_gates_smollm2.json
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from emoe import gating
from emoe.calibration.stream import StreamedModel
from emoe.calibration.text import load_blocks
from emoe.checkpoint.reader import CheckpointReader
from emoe.config import resolve_config
from emoe.conversion.artefact import emoe_config
from emoe.conversion.layer import observe, reorder_layer, split_neurons
from emoe.conversion.plan import make_plan
from emoe.conversion.quality import measure_streams, next_token_labels
from emoe.gating.oracle import expert_energies, oracle_experts
from emoe.modeling.modeling_emoe import Router, make_sparse
from emoe.runtime import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--splits", default="random,weights,coactivation")
    parser.add_argument("--gates", default="average-key,representative,discriminant,oracle")
    parser.add_argument("--active", default="0.25,0.5,0.75")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--held-out-tokens", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    from emoe.assets import resolve_model

    start = time.perf_counter()
    splits, gates = arguments.splits.split(","), arguments.gates.split(",")
    top_ks = [round(float(a) * arguments.experts) for a in arguments.active.split(",")]
    rows = compare(CheckpointReader(resolve_model(arguments.model).folder), arguments, splits, gates, top_ks)
    result = {
        "command": "python scripts/compare_gates.py "
        + " ".join(f"--{k.replace('_', '-')} {v}" for k, v in vars(arguments).items() if k != "output"),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "hardware": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, CPU only",
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - start),
        "rows": rows,
    }
    if arguments.output:
        write_text(arguments.output, json.dumps(result, indent=2) + "\n")
        write_text(arguments.output.with_suffix(".md"), markdown(result, top_ks, arguments.experts))
    show(rows, top_ks, arguments.experts)


def compare(reader: CheckpointReader, arguments, splits: list[str], gates: list[str], top_ks: list[int]) -> list[dict]:
    """Perplexity of each (split, gate, K) and of the dense model."""
    from transformers import AutoTokenizer

    plans = {}
    for split in splits:
        config, _ = resolve_config(
            {
                "model": arguments.model,
                "experts": arguments.experts,
                "split": split,
                "gate": "average-key",  # replaced below; it is the one that needs no buffers
                "calibration": [arguments.calibration],
                "calibration_tokens": arguments.calibration_tokens,
                "held_out_tokens": arguments.held_out_tokens,
                "seed": arguments.seed,
            }
        )
        plans[split] = make_plan(config, reader, arguments.model, [])
    plan = plans[splits[0]]
    blocks = load_blocks(
        plan.config.calibration,
        AutoTokenizer.from_pretrained(reader.folder),
        length=plan.config.sequence_length,
        calibration_tokens=plan.config.calibration_tokens,
        held_out_tokens=plan.config.held_out_tokens,
        seed=plan.config.seed,
    )
    stream = StreamedModel(reader, dtype=torch.float32)
    stream.load_ends()
    calibration, dense = stream.embed(blocks.calibration), stream.embed(blocks.held_out)
    streams = {(s, g, k): dense.copy(stream) for s in splits for g in gates for k in top_ks}
    stream.drop_ends()

    for index in range(reader.num_layers):
        began = time.perf_counter()
        tensors = reader.read(reader.layer_names(index))
        layer = stream.build_layer(index, tensors)
        statistics, inputs = observe(stream, layer, index, calibration, plan)
        stream.run_all(layer, index, dense)
        for split in splits:
            layer = stream.build_layer(index, tensors)
            labels_F = split_neurons(layer, index, statistics, plans[split])
            reorder_layer(layer, index, labels_F, plan)
            ffn = make_sparse(layer, emoe_config(plan))
            routers = fit_gates(stream, ffn, inputs, plan, gates)
            for gate in gates:
                for k in top_ks:
                    run_routed(stream, layer, ffn, index, streams[split, gate, k], routers[gate], k)
        print(f"layer {index}: {time.perf_counter() - began:.0f} s", flush=True)

    stream.load_ends()
    numbered = dict(enumerate(streams))
    quality = measure_streams(
        stream,
        blocks.held_out,
        next_token_labels(blocks.held_out),
        dense,
        {i: streams[key] for i, key in numbered.items()},
        dict.fromkeys(numbered, 0.0),
        arguments.experts,
    )
    rows = [{"split": "–", "gate": "dense", "top_k": arguments.experts, "perplexity": quality.dense, "ratio": 1.0}]
    for row in quality.rows:
        split, gate, k = numbered[row.top_k]
        rows.append({"split": split, "gate": gate, "top_k": k, "perplexity": row.value, "ratio": row.ratio})
    return rows


@torch.inference_mode()
def fit_gates(stream: StreamedModel, ffn, inputs, plan, gates: list[str]) -> dict[str, Router | None]:
    """A router for each gate, all fitted in one pass over the FFN's inputs; None stands for the oracle."""
    experts, width = plan.config.experts, inputs.data.shape[-1]
    fits = {
        gate: gating.get(gate).fit(experts, plan.top_k, width, plan.num_neurons)
        for gate in gates
        if gate != "oracle" and gating.get(gate).needs_calibration
    }
    norm_F = torch.linalg.vector_norm(ffn.weight_views().down_DF, dim=0)
    for batch in stream.batches(inputs.data):
        x_ND = inputs.data[batch].flatten(0, 1)
        h_NF = ffn.hidden(x_ND)
        energy_NE = expert_energies(h_NF, norm_F, experts)
        for fit in fits.values():
            fit.update(x_ND, h_NF, energy_NE)
    routers: dict[str, Router | None] = {"oracle": None}
    for gate in gates:
        if gate != "oracle":
            config = emoe_config(plan)
            config.emoe_gate = gate
            routers[gate] = Router(config, width)
            for name, value in (fits[gate].finish() if gate in fits else {}).items():
                routers[gate]._buffers[name] = value
    return routers


def run_routed(stream, layer, ffn, index: int, states, router: Router | None, top_k: int) -> None:
    """Advance one stream with this router in place of the layer's own."""
    ffn.router.top_k = top_k
    norm_F = torch.linalg.vector_norm(ffn.weight_views().down_DF, dim=0)

    def route(_, arguments, routing):
        x_ND = arguments[0]
        if router is None:
            experts_NK = oracle_experts(ffn.hidden(x_ND), norm_F, ffn.num_experts, top_k)
        else:
            experts_NK = router.logits(x_ND, ffn).topk(top_k, dim=-1).indices
        return routing._replace(experts_NK=experts_NK)

    hook = ffn.router.register_forward_hook(route)
    stream.run_all(layer, index, states)
    hook.remove()


def markdown(result: dict, top_ks: list[int], experts: int) -> str:
    """The table for docs/results, with what it takes to repeat it."""
    rows = result["rows"]
    lines = [
        f"Perplexity on held-out text, ratio to dense in brackets; dense {rows[0]['perplexity']:.2f}.",
        "",
        "| split | gate | " + " | ".join(f"{100 * k / experts:.0f}% active" for k in top_ks) + " |",
        "|---|---" + "|---:" * len(top_ks) + "|",
    ]
    for split, gate in dict.fromkeys((row["split"], row["gate"]) for row in rows[1:]):
        cells = {r["top_k"]: r for r in rows if (r["split"], r["gate"]) == (split, gate)}
        lines.append(
            f"| {split} | {gate} | "
            + " | ".join(f"{cells[k]['perplexity']:.4g} ({cells[k]['ratio']:.3g})" for k in top_ks)
            + " |"
        )
    facts = f"`{result['command']}`, commit {result['commit'][:12]}, {result['hardware']}, torch {result['torch']}"
    return "\n".join([*lines, "", f"{facts}, {result['seconds']} s.", ""])


def show(rows: list[dict], top_ks: list[int], experts: int) -> None:
    """Perplexity and its ratio to dense, one row a (split, gate)."""
    table = Table(title=f"perplexity (ratio to dense); dense {rows[0]['perplexity']:.2f}")
    table.add_column("split")
    table.add_column("gate")
    for k in top_ks:
        table.add_column(f"{100 * k / experts:.0f}% active", justify="right")
    pairs = dict.fromkeys((row["split"], row["gate"]) for row in rows[1:])
    for split, gate in pairs:
        cells = {r["top_k"]: r for r in rows if (r["split"], r["gate"]) == (split, gate)}
        table.add_row(split, gate, *(f"{cells[k]['perplexity']:.4g} ({cells[k]['ratio']:.3g})" for k in top_ks))
    Console().print(table)


if __name__ == "__main__":
    main()
