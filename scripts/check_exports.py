"""Export a real model in every format and compare each, loaded by stock transformers, with what it was made from.

SmolLM2-135M with 64 experts in all layers and in layers 26 and 28 only, and made-up weights in the shapes of GPT-2 and
Pythia (`make_checkpoint.py`), whose exports are checked on real text all the same. What a format cannot represent is a
row, too: it says why. Conversions are kept in ``--folder`` and used again, as are the rows that an earlier run of this
commit has measured; exports are deleted then. Results: docs/results/exports.*.

    python scripts/check_exports.py --folder /tmp/emoe-exports --output docs/results/exports.json
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import emoe
from emoe.cli.progress import progress_bar, silence_libraries
from emoe.errors import UserError
from emoe.runtime import write_text

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

EXPORTS: list[tuple[str, str, dict[str, Any]]] = [
    ("late", "dense", {}),
    ("late", "gguf", {}),
    ("late", "qwen2_moe", {}),
    ("late", "granitemoe", {}),
    ("late", "gpt_oss", {}),
    ("late", "mixtral", {"approximate": True}),
    ("all-default", "dense", {}),
    ("all-default", "gguf", {}),
    ("all-default", "gpt_oss", {"fix_k": 32}),
    ("all-default", "gpt_oss", {"fix_k": 32, "dtype": "bfloat16"}),
    ("all-discriminant", "gpt_oss", {}),
    ("all-discriminant", "mixtral", {"approximate": True}),
    ("all-key", "granitemoe", {}),
    ("all-key", "granitemoe", {"fix_k": 56}),
    ("all-key", "qwen2_moe", {"fix_k": 56}),
    ("all-key", "mixtral", {"fix_k": 56}),
    ("all-key", "mixtral", {"fix_k": 56, "approximate": True}),
    ("gpt2", "dense", {}),
    ("gpt2", "gguf", {}),
    ("gpt2", "gpt_oss", {}),
    ("pythia-160m", "dense", {}),
    ("pythia-160m", "gguf", {}),
]
"""Average-key with half of the experts in all layers leaves a broken model, of which 56 of 64 leave more."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("/tmp/emoe-exports"), help="for conversions; kept")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of text to compare on")
    parser.add_argument("--only", help="formats, with commas between them")
    parser.add_argument("--output", type=Path, required=True, help="JSON; a table goes beside it; rows there are kept")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    silence_libraries()
    rows = json.loads(arguments.output.read_text())["rows"] if arguments.output.is_file() else []
    rows = [row for row in rows if row.get("commit") == commit()]
    for name, to, options in EXPORTS:
        key = {"conversion": name, "format": to, "options": options, "tokens": arguments.tokens, "commit": commit()}
        if (arguments.only and to not in arguments.only.split(",")) or any(key.items() <= row.items() for row in rows):
            continue
        rows.append(key | measure(converted(name, arguments.folder), to, options, arguments))
        publish(rows, arguments.output)
        print(json.dumps(rows[-1]), flush=True)


@functools.cache
def commit() -> str:
    """Of the code that measures."""
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()


def converted(name: str, folder: Path) -> Path:
    """The converted model of a name, made on first use."""
    output, (model, settings) = folder / name, CONVERSIONS[name]
    if not output.exists():
        if model.startswith("like:"):
            source = folder / f"{name}-dense"
            if not source.exists():
                command = [sys.executable, str(ROOT / "scripts" / "make_checkpoint.py"), "--like", name]
                subprocess.run([*command, "--output", str(source)], check=True)
            model = str(source)
        emoe.convert(model, output=output, experts=64, **settings)
    return output


def measure(model: Path, to: str, options: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: the export's own report, or why there is none, and how long it took."""
    target, start = arguments.folder / f"export-{os.getpid()}", time.perf_counter()
    try:
        with progress_bar(quiet=False, unit="parts") as show:
            report = emoe.export(model, target, to, verify_tokens=arguments.tokens, progress=show, **options)
    except UserError as error:
        report = {"refused": str(error), "comparisons": []}
    finally:
        shutil.rmtree(target, ignore_errors=True)
    return {**report, "seconds": round(time.perf_counter() - start, 1)}


def publish(rows: list[dict[str, Any]], output: Path) -> None:
    """JSON and, beside it, a table."""
    result = {
        "command": " ".join(["python", "scripts/check_exports.py", *sys.argv[1:]]),
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "rows": rows,
    }
    write_text(output, json.dumps(result, indent=1) + "\n")
    write_text(output.with_suffix(".md"), page(result["command"], rows))


INTRODUCTION = """# Exports, read back by stock transformers

`{command}`, commit {commit}. Text: Python's reference documentation. SmolLM2-135M, 64 experts: `late` in layers 26 and
28, `all-…` in all; `gpt2` and `pythia-160m` are made-up weights in these shapes. The last row of a model that chooses
compares it with the converted model made to choose as the export does: what is left is arithmetic. Beside it, how many
choices (one a token and layer) the converted model would have made otherwise from the same input, and how far the worst
of these takes an expert behind one that it leaves out, in standard deviations of the token's logits.

| conversion | format | compared with | tokens | max abs Δlogit | KL (nats) | same first choice | perplexity, export and reference | choices that differ | worst |
|---|---|---|---:|---:|---:|---:|---:|---:|---:|
"""  # noqa: E501


def page(command: str, rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines, refused = [], ["", "Refused, as it should be:", ""]
    for row in rows:
        options = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in row["options"].items())
        what = f"{row['format']}{f' ({options})' if options else ''}"
        if "refused" in row:
            refused.append(f"- {row['conversion']}, {what}: {row['refused']}")
        for c in row["comparisons"]:
            other, own = c["perplexity"]
            choices = f"{c['changed']:,} of {c['choices']:,} | {c['margin']:.1e}" if c["choices"] else "|"
            lines.append(
                f"| {row['conversion']} | {what} | {c['reference']} | {c['tokens']} | {c['max_difference']:.2e} | "
                f"{c['kl']:.2e} | {100 * c['agreement']:.3f}% | {own:.4f}, {other:.4f} | {choices} |"
            )
    text = INTRODUCTION.format(command=command, commit=commit()[:12])
    return text + "\n".join(lines + (refused if len(refused) > 3 else [])) + "\n"


if __name__ == "__main__":
    main()
