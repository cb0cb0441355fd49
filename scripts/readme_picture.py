"""README's picture: quality against the experts that a token gets, ours and the other converters, from docs/results.

python scripts/readme_picture.py --output docs/quality.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stages import figure, save

RESULTS = Path(__file__).parents[1] / "docs" / "results"
DOMAIN = "calibration"
TOP = 12.0
"""End of the axis; what lies above leaves the picture."""

OURS = {"emoe": ("emoe", "#0969da"), "outputs refitted": ("emoe --refit-outputs", "#1a7f37")}
RECOVERED = ("then emoe recover", "#8250df")
PEERS = ("CMoE", "LLaMA-MoE", "EMoE as published", "MoEfication")
GREY = "#6e7781"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/quality.png"))
    arguments = parser.parse_args()

    ways: dict[str, list[tuple[float, float]]] = {}
    for cell in json.loads((RESULTS / "frontier_smollm2.json").read_text())["cells"]:
        ways.setdefault(cell["name"], []).append((100 * cell["active"], cell["domains"][DOMAIN]["ratio"]))
    recovery = json.loads((RESULTS / "recover_smollm2.json").read_text())
    domain = next(iter(recovery["dense"]))
    recovered = [(100 * row["active"], row["after"][domain] / recovery["dense"][domain]) for row in recovery["rows"]]

    made = figure(8.2, 4.4)
    axes = made.add_subplot(1, 1, 1)
    axes.axhline(1.0, color="#24292f", linewidth=1)
    axes.annotate("dense", (91, 1.0), (0, 3), textcoords="offset points", ha="right", fontsize=9)
    for name in PEERS:
        points = sorted(ways[name])
        axes.plot(*zip(*points, strict=True), color=GREY, linewidth=1.2, marker="o", markersize=3)
        axes.annotate(name, points[-1], (6, 0), textcoords="offset points", va="center", fontsize=9, color=GREY)
    lines = [(label, colour, sorted(ways[name])) for name, (label, colour) in OURS.items()]
    for label, colour, points in [*lines, (*RECOVERED, sorted(recovered))]:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=2.2, marker="o", markersize=5)
        axes.annotate(label, points[0], (-7, 0), textcoords="offset points", ha="right", va="center", color=colour)
    axes.set_yscale("log")
    axes.set_ylim(0.93, TOP)
    axes.set_xlim(2, 91)
    axes.set_yticks([1, 1.5, 2, 3, 5, 10], labels=["1", "1.5", "2", "3", "5", "10"])
    axes.minorticks_off()
    axes.set_xticks([25, 50, 75], labels=["25%", "50%", "75%"])
    axes.set_xlabel("of 64 experts in every layer, really used by a token")
    axes.set_ylabel("perplexity over the dense model's")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save(made, arguments.output)


if __name__ == "__main__":
    main()
