"""Stick-breaking attention against the O(T L^2) formulation and softmax attention, on the CPU: correctness, then time.

    python kernels/benchmarks/stickbreaking.py --json docs/results/stickbreaking.json   # the whole grid, .md beside
    python kernels/benchmarks/stickbreaking.py --length 512 --dtype fp32 --budget 1     # a glance

Contestants. emoe: what `stick_breaking_attention` runs by default. portable: its path in plain PyTorch. triangular: the
formulation of the released ModuleFormer code, logsigmoid of all logits times a triangular (L, L) matrix, which is built
anew in each call; triangular, kept: the same with the matrix built beforehand. sdpa: `F.scaled_dot_product_attention`,
causal, another function of the same size; its keys are repeated for the query heads outside of the timing.

Sticks. How long a stick lasts is up to the data, and emoe stops where nothing is left of any stick of a tile. "long":
logits about -8, so that every key is visited, the worst case. "short": standard normal logits, and sticks that last for
about 100 keys.

Time. Rounds in one process, in each of which every contestant runs once in an order drawn anew; ratios are medians over
rounds of the ratio within a round. Who takes more than SLOW times as long as emoe runs in every fourth round.

Legend: B batch, H query heads, G key heads, T queries, L keys, A width of a head.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from measure import relative_error
from results import commit, hardware, write_atomically
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from emoe_kernels import use
from emoe_kernels.stickbreaking import stick_breaking_attention

SHAPES = {"n_head 8, k 2": (16, 8, 64), "published, k 2": (2, 1, 1024)}
"""(H, G, A): the defaults of ModuleFormer's configuration (att_hidden 512), and those of the released MoLM-350M-4B."""
LENGTHS = (512, 1024, 2048)
DECODING = 2048
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 1e-5, "bf16": 1e-2}
"""Relative error of the output and of each gradient against the fp32 reference."""
ROUNDS = (3, 31)
SLOW = 5.0
OURS, SDPA, TRIANGULAR, KEPT = "emoe", "sdpa", "triangular", "triangular, kept"


class Case(NamedTuple):
    shape: str
    dtype: str
    sticks: str
    pass_: str
    """fwd, fwdbwd or decode."""
    length: int


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dy: Tensor


def make_inputs(case: Case, seed: int) -> Inputs:
    """Logits are about N(0, 1), or N(-8, 1) where sticks are to last."""
    H, G, A = SHAPES[case.shape]
    T, L = 1 if case.pass_ == "decode" else case.length, case.length
    g = torch.Generator().manual_seed(seed)
    q, k, v, dy = (torch.randn(1, heads, n, A, generator=g) for heads, n in ((H, T), (G, L), (G, L), (H, T)))
    if case.sticks == "long":
        shift = (8 / A**0.5) ** 0.5
        q, k = q + shift, k - shift
    return Inputs(*(x.to(DTYPES[case.dtype]) for x in (q, k, v, dy)))


def triangle(L: int) -> Tensor:
    """(L, L): one where the row is not left of the column."""
    return torch.ones(L, L).tril()


def triangular(q: Tensor, k: Tensor, v: Tensor, sums_LL: Tensor) -> Tensor:
    """The released formulation: sums from the right by a product with a matrix."""
    S, T, L = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    logits = (q @ k.repeat(1, S, 1, 1).mT).float() * q.shape[3] ** -0.5
    hidden = torch.ones(T, L, dtype=torch.bool).triu(L - T + 1)
    left = logsigmoid(-logits).masked_fill(hidden, 0.0)
    weights = torch.exp(logits + left @ sums_LL).masked_fill(hidden, 0.0)
    return weights.to(v.dtype) @ v.repeat(1, S, 1, 1)


def contestants(inputs: Inputs) -> dict[str, tuple[Callable[..., Tensor], Inputs]]:
    """Name → a function of q, k and v, and its inputs."""
    S, L = inputs.q.shape[1] // inputs.k.shape[1], inputs.k.shape[2]
    kept = triangle(L)
    repeated = inputs._replace(k=inputs.k.repeat(1, S, 1, 1), v=inputs.v.repeat(1, S, 1, 1))
    causal = inputs.q.shape[2] > 1

    def portable(q, k, v):
        with use("portable"):
            return stick_breaking_attention(q, k, v).y_BHTA

    return {
        OURS: (lambda q, k, v: stick_breaking_attention(q, k, v).y_BHTA, inputs),
        "portable": (portable, inputs),
        TRIANGULAR: (lambda q, k, v: triangular(q, k, v, triangle(L)), inputs),
        KEPT: (lambda q, k, v: triangular(q, k, v, kept), inputs),
        SDPA: (lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=causal), repeated),
    }


class Run(NamedTuple):
    seconds: float
    results: tuple[Tensor, ...]
    """y, and with a backward pass the gradients of q, k and v."""


def run(function: Callable[..., Tensor], inputs: Inputs, backward: bool) -> Run:
    leaves = [x.detach().requires_grad_(backward) for x in inputs[:3]]
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        y = function(*leaves)
        grads = torch.autograd.grad(y, leaves, inputs.dy) if backward else ()
    return Run(time.perf_counter() - start, (y.detach(), *grads))


def expected(inputs: Inputs, backward: bool) -> tuple[Tensor, ...]:
    """The reference in fp32, a query head at a time: at once it would take gigabytes."""
    G = inputs.k.shape[1]
    q, k, v, dy = (x.float() for x in inputs)

    def reference(*qkv):
        with use("reference"):
            return stick_breaking_attention(*qkv).y_BHTA

    heads = []
    for h in range(q.shape[1]):
        own, shared = slice(h, h + 1), slice(h % G, h % G + 1)
        heads.append(run(reference, Inputs(q[:, own], k[:, shared], v[:, shared], dy[:, own]), backward).results)
    found = [torch.cat([head[i] for head in heads], 1) for i in range(len(heads[0]))]
    return tuple(x if i < 2 else x.unflatten(1, (-1, G)).sum(1) for i, x in enumerate(found))


def measure(case: Case, budget: float, seed: int) -> Iterator[dict]:
    """A row for each contestant; a wrong one has an error and no figure."""
    inputs, backward = make_inputs(case, seed), case.pass_ == "fwdbwd"
    race, rows = contestants(inputs), {}
    truth = expected(inputs, backward)
    estimates = {}
    for name, (function, own) in list(race.items()):
        rows[name] = {**case._asdict(), "impl": name}
        first = run(function, own, backward)
        if name != SDPA:
            worst = max(relative_error(x, y) for x, y in zip(first.results, truth, strict=True))
            rows[name]["check_error"] = float(f"{worst:.2g}")
            if not worst <= TOLERANCES[case.dtype]:
                rows[name]["error"] = f"wrong result, tolerance {TOLERANCES[case.dtype]:g}"
                del race[name]
                continue
        estimates[name] = first.seconds if first.seconds > 1 else run(function, own, backward).seconds
    del truth
    slow = {name for name in race if estimates[name] > SLOW * estimates.get(OURS, float("inf"))}
    a_round = sum(estimates[name] / (4 if name in slow else 1) for name in race)
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(budget / a_round)))
    shuffled, times = random.Random(seed), {name: {} for name in race}
    for i in range(rounds):
        for name in shuffled.sample(list(race), len(race)):
            if name not in slow or i % 4 == 0:
                function, own = race[name]
                times[name][i] = run(function, own, backward).seconds
    for name, row in rows.items():
        if name in race:
            row |= _figures(times[name], times)
        yield row


def _figures(own: dict[int, float], times: dict[str, dict[int, float]]) -> dict:
    values = list(own.values())
    quartiles = statistics.quantiles(values, n=4) if len(values) >= 4 else None
    figures = {
        "median_ms": round(1e3 * statistics.median(values), 4),
        "min_ms": round(1e3 * min(values), 4),
        "iqr_ms": round(1e3 * (quartiles[2] - quartiles[0]), 4) if quartiles else None,
        "rounds": len(values),
    }
    for name, others in times.items():
        common = own.keys() & others.keys()
        figures[f"over {name}"] = round(statistics.median(own[i] / others[i] for i in common), 4)
    return figures


def markdown(rows: list[dict], setting: dict, command: str) -> str:
    """One table a shape and dtype."""
    lines = [
        "# Stick-breaking attention: time against softmax attention and the triangular formulation",
        "",
        "emoe/sdpa: below 1 is faster than `F.scaled_dot_product_attention`. triangular/emoe: how many times longer",
        "the O(T L²) formulation takes, building its matrix or (kept) given it. What is compared, how sticks are made",
        "long or short, and how this is timed stands in `kernels/benchmarks/stickbreaking.py`.",
        "",
    ]
    cells = {(Case(*(row[field] for field in Case._fields)), row["impl"]): row for row in rows}
    cases = list(dict.fromkeys(case for case, _ in cells))
    for shape, dtype in dict.fromkeys((case.shape, case.dtype) for case in cases):
        H, G, A = SHAPES[shape]
        lines += [f"## {shape}: {H} query heads on {G} key heads of {A}, {dtype}", ""]
        heads = (
            "pass",
            "L",
            "sticks",
            "emoe ms",
            "sdpa ms",
            "emoe/sdpa",
            "portable/sdpa",
            "triangular/emoe",
            "kept/emoe",
        )
        lines += ["| " + " | ".join(heads) + " |", "|---|---:|---|" + "---:|" * (len(heads) - 3)]
        for case in cases:
            if (case.shape, case.dtype) != (shape, dtype):
                continue
            asked = [(OURS, "median_ms"), (SDPA, "median_ms"), (OURS, f"over {SDPA}"), ("portable", f"over {SDPA}")]
            asked += [(TRIANGULAR, f"over {OURS}"), (KEPT, f"over {OURS}")]
            values = [cells[case, name].get(field) for name, field in asked]
            told = ["wrong" if value is None else f"{value:.3g}" for value in values]
            lines.append("| " + " | ".join([case.pass_, str(case.length), case.sticks, *told]) + " |")
        lines.append("")
    facts = f"`{command}`, commit {setting['commit']}; {setting['hardware']}, {setting['threads']} threads, torch "
    return "\n".join([*lines, facts + f"{setting['torch']}, seed {setting['seed']}.", ""])


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 1 if a contestant was wrong."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument(
        "--json", type=Path, metavar="FILE", help="write rows here as they are measured, a table (.md) beside"
    )
    p.add_argument("--shape", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    p.add_argument("--length", nargs="+", type=int, default=list(LENGTHS), help="of prefill; decoding has 2048")
    p.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    p.add_argument("--sticks", nargs="+", choices=["long", "short"], default=["long", "short"])
    p.add_argument(
        "--pass", nargs="+", dest="passes", choices=["fwd", "fwdbwd", "decode"], default=["fwd", "fwdbwd", "decode"]
    )
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--budget", type=float, default=10.0, help="seconds for the rounds of a case")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args(argv)
    torch.set_num_threads(a.threads)
    setting = {
        "threads": a.threads,
        "seed": a.seed,
        "torch": torch.__version__,
        "hardware": hardware(),
        "commit": commit(),
    }
    command = f"python kernels/benchmarks/stickbreaking.py {shlex.join(sys.argv[1:] if argv is None else argv)}"
    rows = []
    for shape in a.shape:
        for dtype in a.dtype:
            for pass_ in a.passes:
                for length in (DECODING,) if pass_ == "decode" else a.length:
                    for sticks in a.sticks:
                        case = Case(shape, dtype, sticks, pass_, length)
                        found = list(measure(case, a.budget, a.seed))
                        rows += [{**row, **setting} for row in found]
                        told = (
                            f"{r['impl']} {r['median_ms']:.3g} ms" if "median_ms" in r else f"{r['impl']} WRONG"
                            for r in found
                        )
                        print(", ".join(map(str, case)) + ": " + ", ".join(told), flush=True)
                        if a.json:
                            lines = ",\n".join(json.dumps(row) for row in rows)
                            write_atomically(a.json, f"[\n{lines}\n]\n")
    text = markdown(rows, setting, command)
    if a.json:
        write_atomically(a.json.with_suffix(".md"), text)
    else:
        print("\n" + text)
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
