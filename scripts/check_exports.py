"""Export a real model in every format and compare each, loaded by stock transformers, with what it was made from.

SmolLM2-135M with 64 experts in all layers and in layers 26 and 28 only, and made-up weights in the shapes of GPT-2 and
Pythia (`make_checkpoint.py`), whose exports are checked on real text all the same. What a format cannot represent is a
row, too: it says why. An export that fails for another reason, or goes through where it should be refused, is listed as
failed, and the exit status is 1. Conversions are kept in ``--folder`` and used again, as are the rows that an earlier
run of this commit has measured; exports are deleted then. Results: docs/results/exports.*.

    python scripts/check_exports.py --folder /tmp/emoe-exports --output docs/results/exports.json
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import emoe
from emoe.cli.progress import progress_bar, silence_libraries
from emoe.errors import UserError
from emoe.runtime import processor, write_text

ROOT = Path(__file__).parents[1]
WEIGHTS = {"split": "weights", "gate": "average-key", "held_out_tokens": 0, "routing": "top-k", "allocation": "uniform"}
KEY = WEIGHTS | {"split": "coactivation"}
CONVERSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "all-default": ("smollm2-135m", {}),
    "all-key": ("smollm2-135m", KEY),
    "all-discriminant": ("smollm2-135m", {"held_out_tokens": 0, "routing": "top-k", "allocation": "uniform"}),
    "late": ("smollm2-135m", KEY | {"layers": "26,28"}),
    "gpt2": ("like:gpt2", WEIGHTS),
    "pythia-160m": ("like:pythia-160m", WEIGHTS),
}
"""Name → model and settings beside 64 experts; "like:" stands for made-up weights in that shape."""

RECOVERIES = {"all-softmax": "all-discriminant", "late-softmax": "late"}
"""Name → conversion whose gates become softmax gates in `STEPS` steps: enough for them to have moved."""

STEPS = 20

CANNOT = "cannot represent this model"
DENSE_LAYERS, BIASED_GATE, SOFTMAX = (
    "28 of 30 layers are dense",
    "gate 'discriminant' has a bias",
    "takes a softmax before",
)
EXPORTS: list[tuple[str, str, dict[str, Any], str | None]] = [
    ("late", "dense", {}, None),
    ("late", "gguf", {}, None),
    ("late", "qwen2_moe", {}, None),
    ("late", "granitemoe", {}, DENSE_LAYERS),
    ("late", "gpt_oss", {}, DENSE_LAYERS),
    ("late", "mixtral", {"approximate": True}, DENSE_LAYERS),
    ("all-default", "dense", {}, None),
    ("all-default", "gguf", {}, None),
    ("all-default", "gpt_oss", {"fix_k": 32}, None),
    ("all-default", "gpt_oss", {"fix_k": 32, "dtype": "bfloat16"}, None),
    ("all-discriminant", "gpt_oss", {}, None),
    ("all-discriminant", "mixtral", {"approximate": True}, BIASED_GATE),
    ("all-key", "granitemoe", {}, None),
    ("all-key", "granitemoe", {"fix_k": 56}, None),
    ("all-key", "qwen2_moe", {"fix_k": 56}, None),
    ("all-key", "mixtral", {"fix_k": 56}, SOFTMAX),
    ("all-key", "mixtral", {"fix_k": 56, "approximate": True}, None),
    ("all-softmax", "mixtral", {}, None),
    ("all-softmax", "mixtral", {"dtype": "bfloat16"}, None),
    ("all-softmax", "granitemoe", {}, None),
    ("all-softmax", "gpt_oss", {}, None),
    ("all-softmax", "qwen2_moe", {}, None),
    ("late-softmax", "qwen2_moe", {}, None),
    ("late-softmax", "mixtral", {}, DENSE_LAYERS),
    ("gpt2", "dense", {}, None),
    ("gpt2", "gguf", {}, None),
    ("gpt2", "gpt_oss", {}, "the decoder of gpt2 is not"),
    ("pythia-160m", "dense", {}, None),
    ("pythia-160m", "gguf", {}, "can be read back"),
]
"""Conversion, format, options, and the words of the refusal where the format cannot represent that model. Average-key
with half of the experts in all layers leaves a broken model, of which 56 of 64 leave more."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/emoe-exports"), help="for conversions; kept")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of text to compare on")
    parser.add_argument("--only", help="formats, with commas between them")
    parser.add_argument("--models", help="conversions, with commas between them")
    parser.add_argument("--output", type=Path, required=True, help="JSON; a table goes beside it; rows there are kept")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    silence_libraries()
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.is_file() else []
    rows = [row for row in rows if row.get("commit") == commit() and "failed" not in row]
    for name, to, options, refusal in EXPORTS:
        key = {"conversion": name, "format": to, "options": options, "tokens": arguments.tokens, "commit": commit()}
        asked = ((arguments.only, to), (arguments.models, name))
        if any(names and own not in names.split(",") for names, own in asked):
            continue
        if any(key.items() <= row.items() for row in rows):
            continue
        rows.append(key | measure(converted(name, arguments.folder), to, options, refusal, arguments))
        publish(rows, arguments.output)
        print(json.dumps(rows[-1]), flush=True)
    if any("failed" in row for row in rows):
        sys.exit(1)


@functools.cache
def commit() -> str:
    """Of the code that measures."""
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()


def converted(name: str, folder: Path) -> Path:
    """The converted model of a name, made on first use."""
    output = folder / name
    if name in RECOVERIES:
        if not output.exists():
            with progress_bar(quiet=False, unit="steps") as show:
                emoe.recover(converted(RECOVERIES[name], folder), output, gates="softmax", steps=STEPS, progress=show)
        return output
    model, settings = CONVERSIONS[name]
    if not output.exists():
        if model.startswith("like:"):
            source = folder / f"{name}-dense"
            if not source.exists():
                command = [sys.executable, str(ROOT / "scripts" / "make_checkpoint.py"), "--like", name]
                # As the real ones are stored. In bf16 addmm, GPT-2's linear, takes seconds where the CPU has none.
                subprocess.run([*command, "--dtype", "float32", "--output", str(source)], check=True)
            model = str(source)
        emoe.convert(model, output=output, experts=64, **settings)
    return output


def measure(
    model: Path, to: str, options: dict[str, Any], refusal: str | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    """One row: the export's own report, or why there is none ("refused" or "failed"), and how long it took."""
    target, start = arguments.folder / f"export-{os.getpid()}", time.perf_counter()
    try:
        with progress_bar(quiet=False, unit="parts") as show:
            report = emoe.export(model, target, to, verify_tokens=arguments.tokens, progress=show, **options)
        if refusal:
            report = {"failed": f"written, though the format {CANNOT} ({refusal})", "comparisons": []}
    except UserError as error:
        expected = refusal and CANNOT in str(error) and refusal in str(error)
        report = {"refused" if expected else "failed": str(error), "comparisons": []}
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return {**report, "seconds": round(time.perf_counter() - start, 1)}


def publish(rows: list[dict[str, Any]], output: Path) -> None:
    """JSON and, beside it, a table."""
    result = {
        "command": " ".join(["python", "scripts/check_exports.py", *sys.argv[1:]]),
        "hardware": f"{processor()}, {os.cpu_count()} cores",
        "rows": rows,
    }
    write_text(output, json.dumps(result, indent=1) + "\n")
    write_text(output.with_suffix(".md"), page(result["command"], rows))


INTRODUCTION = """# Exports, read back by stock transformers

`{command}`, commit {commit}. Text: Python's reference documentation. SmolLM2-135M, 64 experts: `late` in layers 26 and
28, `all-…` in all, `…-softmax` with gates that 20 steps of recovery have trained; `gpt2` and `pythia-160m` are made-up
weights in these shapes. The last row of a model that chooses compares it with the converted model made to choose as the
export does: what is left is arithmetic. Beside it, how many choices (one a token and layer) the converted model would
have made otherwise from the same input, and how far the worst of these takes an expert behind one that it leaves out,
in standard deviations of the token's logits.

| conversion | format | compared with | tokens | max abs Δlogit | KL (nats) | same first choice | perplexity, export and reference | choices that differ | worst |
|---|---|---|---:|---:|---:|---:|---:|---:|---:|
"""  # noqa: E501


def page(command: str, rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines, without = [], {"failed": [], "refused": []}
    for row in rows:
        options = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in row["options"].items())
        what = f"{row['format']}{f' ({options})' if options else ''}"
        for outcome, found in without.items():
            if outcome in row:
                found.append(f"- {row['conversion']}, {what}: {row[outcome]}")
        for c in row["comparisons"]:
            other, own = c["perplexity"]
            choices = f"{c['changed']:,} of {c['choices']:,} | {c['margin']:.1e}" if c["choices"] else "|"
            lines.append(
                f"| {row['conversion']} | {what} | {c['reference']} | {c['tokens']} | {c['max_difference']:.2e} | "
                f"{c['kl']:.2e} | {100 * c['agreement']:.3f}% | {own:.4f}, {other:.4f} | {choices} |"
            )
    text = INTRODUCTION.format(command=command, commit=commit()[:12])
    for title, found in (("Failed:", without["failed"]), ("Refused, as it should be:", without["refused"])):
        lines += ["", title, "", *found] if found else []
    return text + "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
