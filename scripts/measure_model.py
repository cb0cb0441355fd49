"""Speed and memory of a converted model against the dense model it was made from.

Both models run in one process and take turns: in each round the dense model and the converted one at each K run once,
in an order drawn anew; the figures are medians over rounds, the ratio that of (time / dense time of the same round).

- **generation**: greedy, batch 1, `--new-tokens` tokens after a prompt of 32, through `generate`; tokens per second.
- **prefill**: one forward call on N tokens of text with a fresh cache, logits of the last token only.
- **FFN share**: in rounds of their own, hooks before and behind every FFN add up its seconds within a call. With the
  share s of the dense model no sparse FFN can bring the time of a call below s * K/E + 1 - s (Amdahl), where K/E is the
  ideal; the converted model's FFN time over the dense one's, gate included, is measured in the same way.
- **memory**: a process for each model and length. Every weight is read once after loading, since a checkpoint may lie
  mapped and not yet in memory. Peak: the kernel's high-water mark of resident memory (VmHWM, reset after that) during a
  prefill, above what was resident before it, in MiB.

Everything runs on the CPU.

    python scripts/measure_model.py out/ --dense path/of/source --output docs/results/whole_model.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import emoe  # noqa: F401 - teaches AutoModelForCausalLM to load converted models
from emoe.calibration.text import BUILTIN, IN_DOMAIN, load_blocks
from emoe.errors import UserError
from emoe.runtime import peak_memory, processor, reset_peak_memory, write_text

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT_TOKENS = 32
DENSE = "dense"


@dataclass(frozen=True)
class Timing:
    """One model in one task."""

    dtype: str
    task: str
    """"generate 64" or "prefill 512"."""
    model: str
    """"dense" or "K 16"."""
    active: float
    """K / E; 1 for the dense model."""
    tokens_per_second: float
    median_ms: float
    min_ms: float
    iqr_ms: float
    rounds: int
    ratio_to_dense: float
    """Median over rounds of time / dense time."""
    ffn_share: float
    """Of this model's time, in its FFNs."""
    ffn_ratio: float
    """FFN time over the dense model's."""
    bound: float
    """Least ratio that an FFN at the ideal K / E could give, from the dense model's share."""


@dataclass(frozen=True)
class Memory:
    """One model at one prefill length, in a process of its own."""

    dtype: str
    tokens: int
    model: str
    loaded_mib: float
    """Resident after loading."""
    mapped_mib: float
    """Of that, pages of mapped files, libraries and checkpoint alike, which the system may drop."""
    peak_mib: float
    """Above that, during the forward call."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of a converted causal model")
    parser.add_argument("--dense", type=Path, required=True, help="folder of the model it was made from")
    parser.add_argument("--top-k", type=int, action="append", help="may be repeated; default: E/4")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be repeated; default: both")
    parser.add_argument("--prefill", type=int, action="append", help="tokens; may be repeated; default: 512 and 2048")
    parser.add_argument("--new-tokens", type=int, default=64, help="0 leaves generation out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON; a table goes beside it as .md")
    parser.add_argument("--memory-child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.memory_child:
            print(json.dumps(memory_child(arguments, **json.loads(arguments.memory_child))))
            return 0
        measure(arguments)
    except UserError as error:
        print(f"measure_model.py: {error}", file=sys.stderr)
        return 2
    return 0


def load(folder: Path, dtype: str) -> nn.Module:
    """The model in that dtype, ready to infer. UserError if the folder is not a causal model's."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not the folder of a checkpoint")
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    except ValueError as error:
        raise UserError(f"{folder} is not a causal language model ({str(error).splitlines()[0]})") from None


def text_tokens(folder: Path, tokens: int) -> Tensor:
    """(1, tokens) of the built-in text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    blocks = load_blocks([BUILTIN], tokenizer, length=tokens, calibration_tokens=tokens, held_out_tokens=tokens, seed=0)
    return blocks.held_out[IN_DOMAIN][:1]


@dataclass(frozen=True)
class Subject:
    """A model, at one K."""

    name: str
    model: nn.Module
    ffns: list[nn.Module]
    active: float
    top_k: int | None

    def ready(self) -> None:
        """Set K; outside of the timing."""
        if self.top_k is not None:
            self.model.set_top_k(self.top_k)


def make_subjects(arguments: argparse.Namespace, dtype: str) -> list[Subject]:
    """The dense model first, then the converted one at each K; their FFNs are at the same places."""
    dense, converted = load(arguments.dense, dtype), load(arguments.model, dtype)
    if not hasattr(converted, "sparse_ffns"):
        raise UserError(f"model: {arguments.model} is dense; `emoe convert` makes a converted one")
    experts = converted.config.num_experts
    top_ks = sorted(set(arguments.top_k or [experts // 4]))
    if not all(1 <= k <= experts for k in top_ks):
        raise UserError(f"--top-k: {top_ks} must lie between 1 and {experts}")
    sparse = set(converted.sparse_ffns().values())
    names = [name for name, module in converted.named_modules() if module in sparse]
    try:
        dense_ffns = [dense.get_submodule(name) for name in names]
    except AttributeError:
        raise UserError(f"--dense: {arguments.dense} has not the layers of {arguments.model}") from None
    ffns = [converted.get_submodule(name) for name in names]
    subjects = [Subject(DENSE, dense, dense_ffns, 1.0, None)]
    return subjects + [Subject(f"K {k}", converted, ffns, k / experts, k) for k in top_ks]


Task = Callable[[nn.Module], object]


def tasks(arguments: argparse.Namespace, ids_1T: Tensor) -> Iterator[tuple[str, int, Task]]:
    """Name, tokens and call of each task."""
    prompt = ids_1T[:, :PROMPT_TOKENS]
    if arguments.new_tokens:
        settings = {"max_new_tokens": arguments.new_tokens, "min_new_tokens": arguments.new_tokens}
        settings |= {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
        yield f"generate {arguments.new_tokens}", arguments.new_tokens, lambda m: m.generate(prompt, **settings)
    for tokens in arguments.prefill or [512, 2048]:
        yield f"prefill {tokens}", tokens, lambda m, n=tokens: m(ids_1T[:, :n], use_cache=True, logits_to_keep=1)


def seconds(task: Task, model: nn.Module) -> float:
    """One call."""
    start = time.perf_counter()
    with torch.inference_mode():
        task(model)
    return time.perf_counter() - start


@contextmanager
def stopwatch(ffns: list[nn.Module]) -> Iterator[list[float]]:
    """Within, the one entry of the list grows by the seconds spent in these modules."""
    total, started = [0.0], [0.0]

    def before(*_) -> None:
        started[0] = time.perf_counter()

    def behind(*_) -> None:
        total[0] += time.perf_counter() - started[0]

    hooks = [f.register_forward_pre_hook(before) for f in ffns] + [f.register_forward_hook(behind) for f in ffns]
    try:
        yield total
    finally:
        for hook in hooks:
            hook.remove()


def measure_task(dtype: str, name: str, tokens: int, task: Task, subjects: list[Subject], rounds: int) -> list[Timing]:
    """Rounds without hooks for the times, then a third as many with hooks for the shares."""
    times: dict[str, list[float]] = {s.name: [] for s in subjects}
    in_ffns: dict[str, list[float]] = {s.name: [] for s in subjects}
    shares: dict[str, list[float]] = {s.name: [] for s in subjects}
    order = random.Random(0)
    for subject in subjects:
        subject.ready()
        seconds(task, subject.model)  # the first call builds primitives and caches
    for _ in range(rounds):
        for subject in order.sample(subjects, len(subjects)):
            subject.ready()
            times[subject.name].append(seconds(task, subject.model))
    for _ in range(max(3, rounds // 3)):
        for subject in order.sample(subjects, len(subjects)):
            subject.ready()
            with stopwatch(subject.ffns) as total:
                whole = seconds(task, subject.model)
            in_ffns[subject.name].append(total[0])
            shares[subject.name].append(total[0] / whole)
    share = statistics.median(shares[DENSE])
    found = []
    for subject in subjects:
        own = times[subject.name]
        quartiles = statistics.quantiles(own, n=4) if len(own) > 1 else [own[0]] * 3
        ratios = (t / d for t, d in zip(own, times[DENSE], strict=True))
        ffn_ratios = (t / d for t, d in zip(in_ffns[subject.name], in_ffns[DENSE], strict=True))
        found.append(
            Timing(
                dtype=dtype,
                task=name,
                model=subject.name,
                active=subject.active,
                tokens_per_second=round(tokens / statistics.median(own), 2),
                median_ms=round(1e3 * statistics.median(own), 3),
                min_ms=round(1e3 * min(own), 3),
                iqr_ms=round(1e3 * (quartiles[2] - quartiles[0]), 3),
                rounds=len(own),
                ratio_to_dense=round(statistics.median(ratios), 4),
                ffn_share=round(statistics.median(shares[subject.name]), 4),
                ffn_ratio=round(statistics.median(ffn_ratios), 4),
                bound=round(share * subject.active + 1 - share, 4),
            )
        )
    return found


def memory_child(arguments: argparse.Namespace, folder: str, dtype: str, tokens: int, top_k: int | None) -> dict:
    """In a process of its own: load, warm up, touch every weight, reset the mark, run once."""
    import ctypes

    ids_1T = text_tokens(arguments.dense, tokens)
    model = load(Path(folder), dtype)
    if top_k is not None:
        model.set_top_k(top_k)
    with torch.inference_mode():
        model(ids_1T[:, :PROMPT_TOKENS], use_cache=True, logits_to_keep=1)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.sum()
        ctypes.CDLL(None).malloc_trim(0)
        reset_peak_memory()
        loaded = peak_memory()  # right after the reset the mark is what is resident now
        mapped = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("RssFile:"))
        model(ids_1T, use_cache=True, logits_to_keep=1)
        return {"loaded": loaded, "mapped": int(mapped.split()[1]) * 1024, "peak": peak_memory()}


def measure_memory(arguments: argparse.Namespace, dtype: str, tokens: int, subject: Subject) -> Memory:
    """Start the child and read what it says."""
    folder = arguments.dense if subject.top_k is None else arguments.model
    job = {"folder": str(folder), "dtype": dtype, "tokens": tokens, "top_k": subject.top_k}
    command = [sys.executable, __file__, str(arguments.model), "--dense", str(arguments.dense)]
    command += ["--threads", str(arguments.threads), "--memory-child", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {folder} at {tokens} tokens: {done.stderr.strip()[-400:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    mib = lambda count: round(count / 2**20, 1)  # noqa: E731
    above = found["peak"] - found["loaded"]
    return Memory(dtype, tokens, subject.name, mib(found["loaded"]), mib(found["mapped"]), mib(above))


def measure(arguments: argparse.Namespace) -> None:
    """All tasks in each dtype; print and write."""
    start = time.perf_counter()
    lengths = arguments.prefill or [512, 2048]
    if min([*lengths, arguments.rounds, arguments.threads]) < 1 or arguments.new_tokens < 0:
        raise UserError("--prefill, --rounds and --threads must be positive, --new-tokens not negative")
    ids_1T = None
    timings: list[Timing] = []
    memories: list[Memory] = []
    for dtype in dict.fromkeys(arguments.dtype or DTYPES):
        subjects = make_subjects(arguments, dtype)
        if ids_1T is None:
            ids_1T = text_tokens(arguments.dense, max(*lengths, PROMPT_TOKENS))
        for name, tokens, task in tasks(arguments, ids_1T):
            timings += measure_task(dtype, name, tokens, task, subjects, arguments.rounds)
            for t in timings[-len(subjects) :]:
                print(
                    f"{dtype} {name}, {t.model}: {t.median_ms:.1f} ms, {t.ratio_to_dense:.3f} of dense, FFN "
                    f"{t.ffn_share:.0%} of the time",
                    flush=True,
                )
        if not arguments.no_memory:
            memories += [measure_memory(arguments, dtype, n, s) for n in lengths for s in subjects]
    result = {
        "command": "python scripts/measure_model.py " + " ".join(sys.argv[1:]),
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "hardware": f"{processor()}, {os.cpu_count()} cores, {arguments.threads} threads, CPU only",
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - start),
        "timings": [asdict(t) for t in timings],
        "memory": [asdict(m) for m in memories],
    }
    if arguments.output:
        write_text(arguments.output, json.dumps(result, indent=2) + "\n")
        write_text(arguments.output.with_suffix(".md"), markdown(result, timings, memories))
    show(timings, memories)


HEADS = ("dtype", "task", "model", "tokens/s", "ms", "spread", "of dense", "bound", "FFN of dense", "FFN share")
MEMORY_HEADS = ("dtype", "tokens", "model", "loaded MiB", "of it mapped", "peak above MiB")


def cells(t: Timing) -> list[str]:
    """One row of the table."""
    figures = [f"{t.tokens_per_second:.4g}", f"{t.median_ms:.4g}", f"{t.iqr_ms / t.median_ms:.0%}"]
    ratios = [f"{x:.3f}" for x in (t.ratio_to_dense, t.bound, t.ffn_ratio)]
    return [t.dtype, t.task, t.model, *figures, *ratios, f"{t.ffn_share:.0%}"]


def memory_cells(m: Memory) -> list[str]:
    """One row of the table."""
    return [m.dtype, str(m.tokens), m.model, f"{m.loaded_mib:.0f}", f"{m.mapped_mib:.0f}", f"{m.peak_mib:.1f}"]


def markdown(result: dict, timings: list[Timing], memories: list[Memory]) -> str:
    """The tables for docs/results, with what it takes to repeat them."""
    lines = [
        "# Whole model: converted against dense",
        "",
        "Medians; spread is the interquartile range over the median. `bound`: the least ratio that a sparse FFN at the "
        "ideal K/E could reach, from the dense model's FFN share s: s · K/E + 1 - s.",
        "",
        "| " + " | ".join(HEADS) + " |",
        "|---|---|---" + "|---:" * (len(HEADS) - 3) + "|",
        *("| " + " | ".join(cells(t)) + " |" for t in timings),
        "",
    ]
    if memories:
        lines += [
            "Peak resident memory of a prefill, above the memory after loading; each in a process of its own.",
            "",
            "| " + " | ".join(MEMORY_HEADS) + " |",
            "|---|---:|---|---:|---:|---:|",
            *("| " + " | ".join(memory_cells(m)) + " |" for m in memories),
            "",
        ]
    facts = f"`{result['command']}`, commit {result['commit'][:12]}, {result['hardware']}, torch {result['torch']}"
    return "\n".join([*lines, f"{facts}, {result['seconds']} s.", ""])


def show(timings: list[Timing], memories: list[Memory]) -> None:
    """The same tables on the terminal."""
    console = Console(width=max(120, Console().width))  # a table cut to 80 columns says nothing
    for title, heads, rows in (
        ("time", HEADS, [cells(t) for t in timings]),
        ("peak memory of a prefill", MEMORY_HEADS, [memory_cells(m) for m in memories]),
    ):
        if rows:
            table = Table(title=title)
            for head in heads:
                table.add_column(head, justify="left" if head in ("dtype", "task", "model") else "right")
            for row in rows:
                table.add_row(*row)
            console.print(table)


if __name__ == "__main__":
    sys.exit(main())
