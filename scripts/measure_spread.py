"""Where `SOFTMAX_SPREAD` of emoe/exporting/stock.py comes from: what it costs to be too large, and too small.

A router for a format that takes the softmax before it chooses has logits of spread s. Too large, and weights of the
chosen are unequal: a KL of a·s². Too small, and near-ties round away, at a rate that grows as 1/s: a KL of b/s. Both
are measured where they are plain to see, far out on their own side: a with the export's choices imposed on the model, b
from what comes on top of that. The sum is least at s = (b / 2a)^(1/3). The text must not be the one that exports are
judged on.

    python scripts/measure_spread.py --model out/ --text corpus:essays --text corpus:german
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import emoe
from emoe.cli.progress import silence_libraries
from emoe.exporting import run, stock

LARGE, SMALL = 2.0**-9, 2.0**-18


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="converted folder, average-key gate, fixed K")
    parser.add_argument("--to", default="qwen2_moe", help="qwen2_moe or mixtral")
    parser.add_argument("--fix-k", type=int, help="as for `emoe export`")
    parser.add_argument("--text", action="append", required=True, help="as for --verify-text; several times for more")
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    silence_libraries()
    run._check = lambda *_: None  # spreads this far out are refused as exports
    for text in arguments.text:
        _, unequal, _ = divergence(LARGE, text, arguments)
        total, imposed, changed = divergence(SMALL, text, arguments)
        a, b = unequal / LARGE**2, (total - imposed) * SMALL
        best = (b / (2 * a)) ** (1 / 3)
        print(
            f"{text}: a {a:.3g}, b {b:.3g} ({100 * changed:.2f}% of choices differ at 2^{math.log2(SMALL):.0f}); "
            f"least at 2^{math.log2(best):.2f}, {a * best**2 + b / best:.2g} nats",
            flush=True,
        )


def divergence(spread: float, text: str, arguments: argparse.Namespace) -> tuple[float, float, float]:
    """KL of an export with this spread, the same on its own choices, in nats, and the share of choices that differ."""
    stock.SOFTMAX_SPREAD = spread
    with tempfile.TemporaryDirectory() as folder:
        report = emoe.export(
            arguments.model,
            Path(folder) / "export",
            arguments.to,
            fix_k=arguments.fix_k,
            approximate=True,
            verify_tokens=arguments.tokens,
            verify_text=text,
        )
    own, imposed = report["comparisons"][0], report["comparisons"][-1]
    return own["kl"], imposed["kl"], imposed["changed"] / imposed["choices"]


if __name__ == "__main__":
    main()
