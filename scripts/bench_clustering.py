"""Balanced clustering against the package that the papers use, k-means-constrained: seconds and inertia.

Same points, one start each, at most the same number of iterations and no early stop, the same threads, one process. The
rows are those of an FFN input matrix with the structure that `make_checkpoint.py` gives it, or a real checkpoint's.

    pip install k-means-constrained
    python scripts/bench_clustering.py --neurons 11008 --width 4096 --experts 64 --output docs/results/clustering.json
    python scripts/bench_clustering.py --model smollm2-135m --layer 12 --experts 64
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from make_checkpoint import structured_rows
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from emoe.assets import resolve_model
from emoe.checkpoint.reader import CheckpointReader
from emoe.clustering import balanced_kmeans
from emoe.clustering.spec import unit_rows
from emoe.errors import UserError
from emoe.runtime import write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--neurons", type=int, default=11008)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--model", help="take the rows of this model instead")
    parser.add_argument("--layer", type=int, default=0, help="of --model")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=1, help="runs with seeds 0, 1, …")
    parser.add_argument("--output", type=Path, help="write the rows here as JSON")
    arguments = parser.parse_args()
    try:
        points_FD = unit_rows(model_rows(arguments) if arguments.model else made_up_rows(arguments))
        peer = import_peer()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)

    rows = []
    with threadpool_limits(limits=arguments.threads):
        for seed in range(arguments.seeds):
            for name, cluster in (("emoe", ours), ("k-means-constrained", peer)):
                start = time.perf_counter()
                labels_F, iterations = cluster(points_FD, arguments.experts, arguments.iterations, seed)
                seconds = time.perf_counter() - start
                sizes_E = np.bincount(labels_F, minlength=arguments.experts)
                rows.append(
                    {
                        "method": name,
                        "seed": seed,
                        "seconds": round(seconds, 3),
                        "inertia": round(inertia(points_FD, labels_F), 3),
                        "iterations": iterations,
                        "sizes": [int(sizes_E.min()), int(sizes_E.max())],
                    }
                )
                print(rows[-1], flush=True)
    show(rows, points_FD.shape, arguments.experts)
    if arguments.output:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        facts = {"command": " ".join(["python", *sys.argv]), "commit": commit, "cores": os.cpu_count()}
        facts |= {"points": list(points_FD.shape), "experts": arguments.experts, "threads": arguments.threads}
        write_text(arguments.output, json.dumps(facts | {"rows": rows}, indent=1) + "\n")


def made_up_rows(arguments: argparse.Namespace) -> np.ndarray:
    """(neurons, width) float32."""
    generator = torch.Generator().manual_seed(0)
    return structured_rows(arguments.neurons, arguments.width, True, generator).numpy()


def model_rows(arguments: argparse.Namespace) -> np.ndarray:
    """Rows under the activation of one layer, float32."""
    reader = CheckpointReader(resolve_model(arguments.model).folder)
    role = "gate" if reader.spec.gate else "up"
    names = [n for n, found in reader.ffn_tensors(arguments.layer).items() if found == (role, "weight")]
    weight = reader.read(names)[names[0]].float()
    return (weight.T if reader.spec.transposed else weight)[: reader.hidden_width].contiguous().numpy()


def ours(points_FD: np.ndarray, experts: int, iterations: int, seed: int) -> tuple[np.ndarray, int]:
    """What `emoe convert` does, without an early stop."""
    found = balanced_kmeans(points_FD, experts, seed=seed, max_iterations=iterations, tolerance=0)
    return found.labels_F, found.iterations


def import_peer():
    """The package's clustering in the shape of `ours`."""
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError:
        raise UserError("k-means-constrained is not installed: pip install k-means-constrained") from None

    def cluster(points_FD, experts, iterations, seed):
        size = len(points_FD) // experts
        limits = {"size_min": size, "size_max": size, "n_init": 1, "max_iter": iterations, "tol": 0}
        found = KMeansConstrained(experts, **limits, random_state=seed, n_jobs=1).fit(points_FD)
        return found.labels_, found.n_iter_

    return cluster


def inertia(points_FD: np.ndarray, labels_F: np.ndarray) -> float:
    """Sum of squared distances to the own cluster's mean."""
    groups = (points_FD[labels_F == e] for e in np.unique(labels_F))
    return float(sum(np.square(group - group.mean(0), dtype=np.float64).sum() for group in groups))


def show(rows: list[dict], shape: tuple[int, int], experts: int) -> None:
    """One line a run, and how many times faster than the package."""
    table = Table(title=f"{shape[0]:,} x {shape[1]:,} points, {experts} equal clusters")
    for column in ("method", "seed", "seconds", "times faster", "inertia", "iterations"):
        table.add_column(column, justify="left" if column == "method" else "right")
    slow = {row["seed"]: row["seconds"] for row in rows if row["method"] == "k-means-constrained"}
    for row in rows:
        faster = f"{slow[row['seed']] / row['seconds']:.1f}"
        cells = (row["method"], row["seed"], row["seconds"], faster, row["inertia"], row["iterations"])
        table.add_row(*map(str, cells))
    Console().print(table)


if __name__ == "__main__":
    main()
