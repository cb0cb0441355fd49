"""The sparse FFN against the dense layer and against what else is installed: time, memory, correctness.

    python kernels/benchmarks/run.py --json docs/results/sparse_ffn.json   # the whole grid
    python kernels/benchmarks/run.py --quick                               # six cases

With --json, a table (.md) and a plot (.png) are written beside it. How things are measured: measure.py and memory.py;
what is measured: cases.py and registry.py. Everything runs on the CPU.
"""

from __future__ import annotations

import argparse
import difflib
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from cases import (
    DTYPES,
    EXPERTS,
    FRACTIONS,
    PASSES,
    SHAPES,
    TOKENS,
    Case,
    CaseError,
    Inputs,
    Layer,
    Reference,
    Traces,
    grid,
    make_inputs,
    make_layer,
    make_shape,
    make_weights,
    read_traces,
    reference,
)
from measure import Outcome, Patience, Peak, measure_case, measure_memory
from registry import DENSE, Implementation, by_name
from results import Row, Setting, by_case, commit, hardware, markdown, plot, read_rows, write_atomically, write_rows

MEMORY_FRACTION = Fraction(1, 4)
"""K / E at which peak memory is measured; at others it would say little more and take minutes."""


class Parser(argparse.ArgumentParser):
    """One line of complaint and status 2."""

    def error(self, message: str):
        self.exit(2, f"{Path(self.prog).name}: {message}\n")


def listed(convert: Callable[[str], object], example: str) -> Callable[[str], list]:
    """An argparse type: values separated by commas."""

    def parse(text: str) -> list:
        try:
            return [convert(part.strip()) for part in text.split(",")]
        except (ValueError, ZeroDivisionError):
            raise argparse.ArgumentTypeError(f"'{text}' is not understood; for example {example}") from None

    return parse


def one_of(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """An argparse type: names separated by commas."""

    def parse(text: str) -> list[str]:
        names = [part.strip() for part in text.split(",")]
        for name in names:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f" (did you mean '{close[0]}'?)" if close else ""
                raise argparse.ArgumentTypeError(f"'{name}' is unknown{hint}; known: {', '.join(known)}")
        return names

    return parse


def _dimensions(text: str) -> tuple[int, int]:
    width, hidden = text.split("x")
    return _positive(width), _positive(hidden)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def positive(convert: Callable[[str], float]) -> Callable[[str], float]:
    """An argparse type: a number above zero."""

    def parse(text: str) -> float:
        try:
            value = convert(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
        return value

    return parse


def parser() -> Parser:
    """The flags. Lists are separated by commas."""
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument(
        "--json", type=Path, metavar="FILE", help="write rows here as they are measured, .md and .png beside"
    )
    p.add_argument("--quick", action="store_true", help="(2048, 5632), K/E 1/4, N 1, 64 and 512, forward")
    p.add_argument("--resume", action="store_true", help="keep the rows that --json FILE holds")
    p.add_argument("--shape", type=listed(_dimensions, "2048x5632"), metavar="DxF,…")
    p.add_argument("--experts", type=positive(int), metavar="E", help=f"default {EXPERTS}")
    p.add_argument("--tokens", type=listed(_positive, "1,64"), metavar="N,…")
    p.add_argument("--fraction", type=listed(Fraction, "1/4"), metavar="K/E,…")
    p.add_argument("--dtype", type=one_of(tuple(DTYPES)), metavar="fp32,bf16")
    p.add_argument("--pass", dest="passes", type=one_of(PASSES), metavar="fwd,fwdbwd")
    p.add_argument("--impl", type=one_of(tuple(by_name())), metavar="NAME,…", help="dense is always measured")
    p.add_argument("--routing", nargs="+", default=["random"], metavar="random | trace FILE")
    p.add_argument("--cold", action="store_true", help="flush the caches before each timed call")
    p.add_argument("--threads", type=positive(int), default=2)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--budget", type=positive(float), help="seconds for the rounds of a case; default 3, --quick 10")
    p.add_argument(
        "--memory-limit", type=positive(float), default=4.0, help="GiB of scratch above which one is skipped"
    )
    p.add_argument(
        "--memory-tokens",
        type=listed(int, "2048"),
        metavar="N,…",
        help=f"forward cases at K/E {MEMORY_FRACTION} whose peak memory is measured; default 2048, 0 for none",
    )
    return p


@dataclass
class Plan:
    """A checked command line."""

    cases: list[Case]
    implementations: list[Implementation]
    traces: Traces | None
    memory_tokens: list[int]
    setting: Setting


def make_plan(a: argparse.Namespace) -> Plan:
    """CaseError for whatever does not fit together."""
    traces = None
    if a.routing[0] == "trace" and len(a.routing) == 2:
        traces = read_traces(Path(a.routing[1]))
    elif a.routing != ["random"]:
        raise CaseError(f"--routing: '{' '.join(a.routing)}' is neither 'random' nor 'trace FILE'")
    if a.resume and not a.json:
        raise CaseError("--resume needs --json FILE")
    if a.json and not a.json.absolute().parent.is_dir():
        raise CaseError(f"--json: the folder {a.json.absolute().parent} does not exist")
    if a.json and (a.json.is_dir() or a.json.suffix in (".md", ".png")):
        raise CaseError(f"--json: {a.json} is a folder or would be overwritten by the table or the plot")
    if traces and (a.shape or a.experts):
        raise CaseError("--shape and --experts come from the trace; leave them out")
    if traces:
        experts = traces.experts
        known = sorted(Fraction(k, experts) for k in traces.layers)
        fractions = a.fraction or known
        for fraction in fractions:
            if fraction not in known:
                raise CaseError(f"--fraction {fraction}: the trace holds {', '.join(map(str, known))}")
        pairs = [(traces.width, traces.hidden)]
    else:
        experts = a.experts or EXPERTS
        fractions = a.fraction or ([Fraction(1, 4)] if a.quick else FRACTIONS)
        pairs = a.shape or ([(2048, 5632)] if a.quick else SHAPES)
    shapes = [make_shape(*pair, experts, fraction) for pair in pairs for fraction in fractions]
    tokens = a.tokens or ([1, 64, 512] if a.quick else list(TOKENS))
    if traces:
        for shape in shapes:
            traces.windows(max(tokens), shape.chosen)
    passes = a.passes or (["fwd"] if a.quick else list(PASSES))
    names = {DENSE, *(a.impl or by_name())}
    return Plan(
        cases=list(grid(shapes, tokens, a.dtype or list(DTYPES), passes)),
        implementations=[i for i in by_name().values() if i.name in names],
        traces=traces,
        memory_tokens=a.memory_tokens or ([] if a.quick else [2048]),
        setting=Setting(
            threads=a.threads,
            seed=a.seed,
            routing=traces.name if traces else "random",
            cache="cold" if a.cold else "shared",
            torch=torch.__version__,
            hardware=hardware(),
            commit=commit(),
        ),
    )


def resumed_rows(path: Path, setting: Setting) -> list[Row]:
    """The rows that are there already. CaseError where they were measured in another setting."""
    if not path.exists():
        return []
    rows = read_rows(path)
    for name in ("threads", "seed", "routing", "cache", "torch", "hardware"):
        there, here = {getattr(row.setting, name) for row in rows}, getattr(setting, name)
        if there - {here}:
            raise CaseError(
                f"--resume: rows in {path} were measured with {name} {', '.join(map(str, there))}, not {here}"
            )
    return rows


class Workshop:
    """Weights, inputs and reference of the current case; of a previous one only what the current one shares."""

    def __init__(self, seed: int, traces: Traces | None, passes: set[str]) -> None:
        self.seed, self.traces, self.backward = seed, traces, "fwdbwd" in passes
        self._size: tuple | None = None
        self._inputs_of: tuple | None = None

    def __call__(self, case: Case) -> tuple[Layer, Inputs, Reference]:
        size = case.shape[:3]
        if self._size != size:
            self._inputs_of, self.expected, self.layers = None, None, {}  # free before making the next
            self.weights, self._size = make_weights(case.shape.width, case.shape.hidden, self.seed), size
        if self._inputs_of != (case.shape, case.tokens):
            self.expected = None
            self.inputs = make_inputs(case.shape, case.tokens, self.seed, self.traces)
            self.expected = reference(self.weights, self.inputs, case.shape.experts, self.backward)
            self._inputs_of = (case.shape, case.tokens)
        if case.dtype not in self.layers:
            self.layers[case.dtype] = make_layer(self.weights, case.shape.experts, case.dtype)
        return self.layers[case.dtype], self.inputs, self.expected


def show(case: Case, union: float, outcomes: dict[str, Outcome], seconds: float, progress: str, told: set) -> None:
    """One line a case on standard output; an error's text where it has not been told before."""
    cells = []
    for name, o in outcomes.items():
        if name == DENSE:
            cells.append(f"dense {o.median_ms:.3g} ms")
        elif o.ratio_to_dense is not None:
            cells.append(f"{name} {o.ratio_to_dense:.3g}")
        else:
            cells.append(f"{name} {'ERROR' if o.error else 'skipped'}")
    print(f"[{progress}] {case}, union {union:g}: {', '.join(cells)} ({seconds:.0f} s)", flush=True)
    for name, o in outcomes.items():
        if o.error and (name, o.error) not in told:
            told.add((name, o.error))
            print(f"    {name}: {o.error}", flush=True)


def run(plan: Plan, arguments: argparse.Namespace, rows: list[Row]) -> list[Row]:
    """Measure what `rows` does not hold yet; the file is written after each case."""
    workshop = Workshop(arguments.seed, plan.traces, {case.pass_ for case in plan.cases})
    patience = Patience()
    rows, told = list(rows), set()
    for number, case in enumerate(plan.cases, 1):
        present = by_case(rows).get(case, {})
        missing = [i for i in plan.implementations if i.name not in present]
        if not missing:
            continue
        start = time.perf_counter()
        entrants = [i for i in plan.implementations if i.name == DENSE or i in missing]
        layer, inputs, expected = workshop(case)
        outcomes = measure_case(
            case,
            entrants,
            layer,
            inputs,
            expected,
            budget=arguments.budget or (10.0 if arguments.quick else 3.0),
            memory_limit=arguments.memory_limit,
            patience=patience,
            cold=arguments.cold,
        )
        peaks: dict[str, Peak | None] = {}
        if case.pass_ == "fwd" and case.tokens in plan.memory_tokens and case.shape.ideal == MEMORY_FRACTION:
            names = [name for name, o in outcomes.items() if o.ratio_to_dense is not None]
            peaks = measure_memory(case.shape, case.tokens, case.dtype, names, arguments.threads, arguments.seed)
        new = {i.name for i in missing}
        rows += [
            Row(case, name, outcome, inputs.union, peaks.get(name), plan.setting)
            for name, outcome in outcomes.items()
            if name in new
        ]
        if arguments.json:
            write_rows(arguments.json, rows)
        progress = f"{number}/{len(plan.cases)}"
        show(case, inputs.union, outcomes, time.perf_counter() - start, progress, told)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    p = parser()
    arguments = p.parse_args(argv)
    try:
        plan = make_plan(arguments)
        rows = resumed_rows(arguments.json, plan.setting) if arguments.resume else []
    except CaseError as error:
        p.error(str(error))
    torch.set_num_threads(arguments.threads)
    print(f"{plan.setting.hardware}, {arguments.threads} threads, torch {plan.setting.torch}", flush=True)
    start = time.perf_counter()
    try:
        rows = run(plan, arguments, rows)
    except KeyboardInterrupt:
        print("interrupted; --resume with the same --json goes on", file=sys.stderr)
        return 130
    command = f"python kernels/benchmarks/run.py {shlex.join(sys.argv[1:] if argv is None else argv)}"
    text = markdown(rows, command)
    if arguments.json:
        write_atomically(arguments.json.with_suffix(".md"), text)
        plot(rows, arguments.json.with_suffix(".png"))
        print(f"written: {arguments.json}, .md and .png, after {time.perf_counter() - start:.0f} s")
    else:
        print("\n" + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
