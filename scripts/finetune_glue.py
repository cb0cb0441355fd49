"""Fine-tune on a task of GLUE, dense and as a mixture of experts, and print both scores: a thin example of the library.

    python scripts/finetune_glue.py --task sst2 --model bert-base --seeds 0,1,2 --output runs/sst2

Without the hub, give ``--data-dir DIR`` with ``DIR/sst2/train.csv`` and so on (docs/finetuning.md).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from emoe import tasks
from emoe.cli.progress import FINETUNING, progress_bar, silence_libraries
from emoe.config import merge_settings, read_config_file
from emoe.errors import UserError
from emoe.finetuning import arms
from emoe.finetuning.settings import FinetuneConfig
from emoe.finetuning.tune import finetune
from emoe.finetuning.tuning import check_tuning

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
    silence_libraries()
    methods, output = given.pop("methods").split(","), Path(given.pop("output"))
    recipe = read_config_file(RECIPES / f"glue_{given['tuning']}.yaml", kind=FinetuneConfig)
    if given["max_steps"]:
        recipe.pop("epochs", None)  # steps stand in their place
    configs = []
    for method in methods:  # a wrong one is found before the first is trained
        flags = given | {"method": method, "output": str(output / method), "resume": True}
        configs.append(merge_settings(FinetuneConfig, flags, under=recipe))
        check_tuning(configs[-1], arms.get(method), tasks.get(configs[-1].task))
    for config in configs:
        with progress_bar(False, "steps", FINETUNING) as show:
            records = finetune(config, show, say=lambda line: print(line, file=sys.stderr))
        for name, facts in records[0]["readings"]["as-trained"].items():
            scores = [100 * record["readings"]["as-trained"][name]["score"] for record in records]
            spread = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else "–"
            print(f"{config.method:<10} {name:<20} {facts['metric']:<18} {statistics.mean(scores):6.2f} ± {spread}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"finetune_glue: {error}", file=sys.stderr)
        sys.exit(2)
