"""Time of a training step by arm: dense, EMoE on the sparse kernels, EMoE masked (every neuron computed, then zeroed).

    python scripts/bench_finetune.py --model all-minilm-l6-v2 --experts 64 --active 0.25,0.5 --layers all

Prints a Markdown table. Time is the processor time of this process on a CPU, so that a busy machine does not change it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from emoe.distributed import Group
from emoe.finetuning import arms
from emoe.finetuning.model import build, converted_folder, load_tokenizer
from emoe.finetuning.settings import FinetuneConfig
from emoe.tasks import get


def seconds_of_step(model: torch.nn.Module, batch: dict, steps: int, half: bool) -> list[float]:
    """Forward, backward and AdamW, after two steps that are not counted."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    found = []
    for number in range(steps + 2):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number >= 2:
            found.append(time.process_time() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="all-minilm-l6-v2")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--active", default="0.25,0.5")
    parser.add_argument("--layers", default="-4::2")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--length", type=int, default=32, help="tokens of an example")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--bfloat16", action="store_true")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        config = FinetuneConfig(model=given.model, experts=given.experts, layers=given.layers, task="sentiment")
        folder = converted_folder(config, Path(work), ["text"], Group(), lambda *_: None)
        tokenizer = load_tokenizer(folder)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, len(tokenizer), (given.batch_size, given.length), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
        ways = [("dense", "vanilla", 1.0)]
        for active in map(float, given.active.split(",")):
            ways += [(f"EMoE {active:.0%}, {how}", "emoe", active) for how in ("sparse", "masked")]
        for name, method, active in ways:
            arm = arms.get(method)
            settings = config.model_copy(update={"top_k": max(1, round(active * given.experts))})
            model = build(settings, arm, folder, get("sentiment"), tokenizer.pad_token_id, 0).model.train()
            if name.endswith("masked"):
                for ffn in model.sparse_ffns().values():
                    ffn.activation = None  # as if the kernels did not know it
            rows.append((name, seconds_of_step(model, batch, given.steps, given.bfloat16)))
    dense = statistics.median(rows[0][1])
    print(f"{given.model}, layers {given.layers}, {given.batch_size} x {given.length} tokens, ", end="")
    print(f"{'bfloat16' if given.bfloat16 else 'float32'}, {torch.get_num_threads()} threads\n")
    print("| step | CPU s, median | least | over dense |\n|---|---|---|---|")
    for name, seconds in rows:
        median = statistics.median(seconds)
        print(f"| {name} | {median:.3f} | {min(seconds):.3f} | {median / dense:.2f} |")


if __name__ == "__main__":
    main()
