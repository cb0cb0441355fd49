"""Fine-tune on a task of GLUE, dense and as a mixture of experts, and print both scores: a thin example of the library.

    python scripts/finetune_glue.py --task sst2 --model bert-base --seeds 0,1,2 --output runs/sst2

Without the hub, give ``--data-dir DIR`` with ``DIR/sst2/train.csv`` and so on (docs/finetuning.md).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from emoe.config import merge_settings, read_config_file
from emoe.errors import UserError
from emoe.finetuning.settings import FinetuneConfig
from emoe.finetuning.tune import finetune

RECIPES = Path(__file__).parents[1] / "configs" / "finetune"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--model")
    parser.add_argument("--methods", default="vanilla,emoe")
    parser.add_argument("--tuning", choices=["full", "lora"], default="full")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--data-dir")
    parser.add_argument("--train-limit", type=int)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--layers")
    parser.add_argument("--experts", type=int)
    parser.add_argument("--output", required=True)
    given = vars(parser.parse_args())
    methods, output = given.pop("methods").split(","), Path(given.pop("output"))
    recipe = read_config_file(RECIPES / f"glue_{given['tuning']}.yaml", kind=FinetuneConfig)
    for method in methods:
        flags = given | {"method": method, "output": str(output / method), "resume": True}
        config = merge_settings(FinetuneConfig, flags, under=recipe)
        records = finetune(config, say=lambda line: print(line, file=sys.stderr))
        for name, facts in records[0]["readings"]["as-trained"].items():
            scores = [100 * record["readings"]["as-trained"][name]["score"] for record in records]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            print(f"{method:<10} {name:<20} {facts['metric']:<18} {statistics.mean(scores):6.2f} ± {spread:.2f}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"finetune_glue: {error}", file=sys.stderr)
        sys.exit(2)
