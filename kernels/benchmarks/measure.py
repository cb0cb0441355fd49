"""Check, then time: what one case of the grid gives for every implementation.

Legend: N tokens, D model width, K experts chosen per token.

**Check.** Each implementation's first call: its output and, with a backward pass, the gradients of x and of every
weight, against the fp32 reference on the first routing; error = norm of the difference over norm of the expected, the
largest of them is kept. An implementation above its `TOLERANCES` gets no figure.

**Time.** Rounds in one process; in each round every implementation runs once, on the routing of that round. The order
is drawn anew for each round: with a fixed one, or one that rotates, an implementation would always find in the cache
what the same predecessor left there. The gradients are dropped before the clock starts, so that a pass with a backward
pays for fresh memory, the dense one too. `ratio_to_dense` is the median over rounds of (time / dense time of the same
round): what slows the machine down for a while slows both. `ratio_of_minima` is the ratio of the two minima.

**Caches.** "shared": as the preceding implementation left them. A small layer then lies in L3 all the time, dense and
sparse; in a model of many layers it would not. "cold": `FLUSH_BYTES` are read before each call, and weights come from
memory, but so do the interpreter's data, which harms an implementation of many calls more than it does in a model.

**How many rounds.** As many as `budget` seconds allow, within `ROUNDS`. An implementation that takes more than `SLOW`
times as long as dense runs in every fourth round; one that gains nothing on dense (`LOST`) and takes longer than
`LONG_S` is given the time of its check alone (rounds = 1, a first call, over dense's first call). One that took longer
than `PATIENCE_S` for fewer tokens of the same shape, dtype and pass is skipped, unless dense has become slow as well.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from cases import DTYPES, Case, Inputs, Layer, Reference, Shape
from registry import DENSE, Implementation, Runner
from torch import Tensor

TOLERANCES = {"fp32": 1e-5, "bf16": 5e-2}
"""Relative error. bf16 keeps 8 bits, 0.4% a rounding, and a dense layer is off by about as much; transformers' eager
adds K parts in bf16, its batched_mm the weights' gradients of all tokens (2.5% at N 2048). Each row has its error."""

ROUNDS = (3, 31)
"""Least and most rounds."""
SLOW = 5.0
"""Times dense."""
LOST = 0.95
"""Times dense."""
LONG_S = 1.0
"""Seconds a pass."""
PATIENCE_S = 10.0
"""Seconds a pass."""
FLUSH_BYTES = 128 << 20
"""More than the last cache of the machines that this is for."""


@dataclass(frozen=True)
class Outcome:
    """One implementation in one case: either figures, or the reason why there are none."""

    ratio_to_dense: float | None = None
    ratio_of_minima: float | None = None
    median_ms: float | None = None
    min_ms: float | None = None
    iqr_ms: float | None = None
    """Distance between the quartiles; None below four rounds."""
    dense_ms: float | None = None
    """Median of dense in the same rounds."""
    rounds: int | None = None
    check_error: float | None = None
    """The largest relative error of the check."""
    error: str | None = None
    """It crashed or gave a wrong result."""
    skipped: str | None = None


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of the expected; infinite for NaN and for a wrong shape."""
    if actual.shape != expected.shape:
        return float("inf")
    error = float((actual.float() - expected).norm() / expected.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


class Pass(NamedTuple):
    """What one call gave."""

    seconds: float
    y_ND: Tensor


def one_pass(runner: Runner, x_ND: Tensor, experts_NK: Tensor, dy_ND: Tensor | None) -> Pass:
    """Run once; with dy also backward, leaving fresh gradients in x and the weights."""
    for leaf in (x_ND, *runner.leaves):
        leaf.grad = None
    start = time.perf_counter()
    if dy_ND is None:
        with torch.no_grad():
            y_ND = runner.call(x_ND, experts_NK)
    else:
        y_ND = runner.call(x_ND, experts_NK)
        y_ND.backward(dy_ND)
    return Pass(time.perf_counter() - start, y_ND.detach())


@dataclass
class _Entrant:
    """An implementation that is still in the race, with its times in seconds."""

    runner: Runner
    first: float
    check_error: float | None
    estimate: float = 0.0
    times: dict[int, float] = field(default_factory=dict)
    """By round."""


@dataclass
class Patience:
    """Seconds that an implementation took for fewer tokens, by (shape, dtype, pass, implementation)."""

    known: dict[tuple, float] = field(default_factory=dict)

    def refuses(self, case: Case, name: str, dense: float) -> str | None:
        """Why this one is not worth running, or None."""
        took = self.known.get((case.shape, case.dtype, case.pass_, name), 0.0)
        if took > PATIENCE_S and took > SLOW * dense:
            return f"took {took:.0f} s for fewer tokens"
        return None

    def learn(self, case: Case, name: str, seconds: float) -> None:
        """Keep the time of a pass."""
        self.known[case.shape, case.dtype, case.pass_, name] = seconds


def one_line(error: BaseException) -> str:
    """The exception in at most 200 characters."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:200]}"


def _check(y_ND: Tensor, x_ND: Tensor, runner: Runner, expected: Reference, backward: bool) -> dict[str, float]:
    errors = {"y": relative_error(y_ND, expected.y_ND)}
    if backward:
        found = {"x": torch.zeros_like(x_ND) if x_ND.grad is None else x_ND.grad, **runner.gradients()}
        errors |= {f"d{name}": relative_error(found[name], grad) for name, grad in expected.gradients.items()}
    return errors


def measure_case(
    case: Case,
    implementations: list[Implementation],
    layer: Layer,
    inputs: Inputs,
    expected: Reference,
    *,
    budget: float,
    memory_limit: float,
    patience: Patience,
    cold: bool = False,
    clock: Callable[..., Pass] = one_pass,
) -> dict[str, Outcome]:
    """Outcomes by implementation; `dense` must be the first.

    Args:
        budget: seconds for the rounds; the check comes on top.
        memory_limit: GiB of scratch memory above which an implementation is not tried.
        cold: flush the caches before each timed call.
    """
    assert implementations[0].name == DENSE
    backward = case.pass_ == "fwdbwd"
    dtype = DTYPES[case.dtype]
    x_ND = inputs.x_ND.detach().to(dtype).requires_grad_(backward)
    dy_ND = inputs.dy_ND.to(dtype) if backward else None
    outcomes: dict[str, Outcome] = {}
    race: dict[str, _Entrant] = {}

    for implementation in implementations:
        name = implementation.name
        scratch = implementation.scratch_bytes(case) / 2**30
        reason = patience.refuses(case, name, race[DENSE].first) if race else None
        if scratch > memory_limit:
            reason = f"would take {scratch:.0f} GiB, limit {memory_limit:g}"
        if reason:
            outcomes[name] = Outcome(skipped=reason)
            continue
        try:
            runner = implementation.prepare(layer)
            first = clock(runner, x_ND, inputs.routings[0], dy_ND)
            worst = None
            if implementation.sparse:
                errors = _check(first.y_ND, x_ND, runner, expected, backward)
                worst = max(errors.values())
                if not worst <= TOLERANCES[case.dtype]:
                    told = ", ".join(f"{part} {error:.1e}" for part, error in errors.items())
                    outcomes[name] = Outcome(
                        check_error=worst, error=f"wrong result, tolerance {TOLERANCES[case.dtype]:g}: {told}"
                    )
                    continue
        except Exception as error:  # whatever another library raises is a result
            if name == DENSE:
                raise
            outcomes[name] = Outcome(error=one_line(error))
            continue
        finally:
            x_ND.grad = None
            layer.drop_gradients()  # one implementation's gradients in memory at a time
        patience.learn(case, name, first.seconds)
        race[name] = _Entrant(runner, first.seconds, worst)

    flush = torch.zeros(FLUSH_BYTES // 8, dtype=torch.int64) if cold else None

    def run(entrant: _Entrant, routing: int) -> float:
        if flush is not None:
            flush.sum()
        seconds = clock(entrant.runner, x_ND, inputs.routings[routing % len(inputs.routings)], dy_ND).seconds
        for leaf in (x_ND, *entrant.runner.leaves):
            leaf.grad = None
        return seconds

    dense = race[DENSE]
    long = [name for name, e in race.items() if name != DENSE and e.first > max(LOST * dense.first, LONG_S)]
    for name in long:
        outcomes[name] = _outcome([race[name].first], [dense.first], race[name].check_error)
        del race[name]
    for entrant in race.values():  # a first call also builds primitives; a second tells what a round will take
        entrant.estimate = entrant.first if entrant.first > 1 else min(entrant.first, run(entrant, 1))
    slow = {name for name, e in race.items() if e.estimate > SLOW * dense.estimate}
    a_round = sum(e.estimate / (4 if name in slow else 1) for name, e in race.items())
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(budget / a_round)))
    shuffled = random.Random(rounds)
    for i in range(rounds):
        for name in shuffled.sample(list(race), len(race)):
            if name not in slow or i % 4 == 0:
                race[name].times[i] = run(race[name], i)
    for name, entrant in race.items():
        own = list(entrant.times.values())
        outcomes[name] = _outcome(own, [dense.times[i] for i in entrant.times], entrant.check_error)
    return {implementation.name: outcomes[implementation.name] for implementation in implementations}


def _outcome(times: list[float], dense: list[float], check_error: float | None) -> Outcome:
    """Figures from the seconds of an implementation and of dense in the same rounds."""
    quartiles = statistics.quantiles(times, n=4) if len(times) >= 4 else None
    return Outcome(
        ratio_to_dense=round(statistics.median(t / d for t, d in zip(times, dense, strict=True)), 4),
        ratio_of_minima=round(min(times) / min(dense), 4),
        median_ms=round(1e3 * statistics.median(times), 4),
        min_ms=round(1e3 * min(times), 4),
        iqr_ms=round(1e3 * (quartiles[2] - quartiles[0]), 4) if quartiles else None,
        dense_ms=round(1e3 * statistics.median(dense), 4),
        rounds=len(times),
        check_error=None if check_error is None else float(f"{check_error:.2g}"),
    )


class Peak(NamedTuple):
    """Peak memory of a forward pass above inputs, weights and output, in MiB; see memory.py."""

    first: float
    """First call in a fresh process: scratch, and what stays (packed weights, oneDNN's compiled primitives)."""
    again: float
    """Second call, above what the first one left behind: scratch alone."""


def measure_memory(
    shape: Shape, tokens: int, dtype: str, names: list[str], threads: int, seed: int
) -> dict[str, Peak | None]:
    """Peaks by implementation, measured in processes of their own; None for one that died."""
    command = [sys.executable, str(Path(__file__).with_name("memory.py"))]
    command += ["--shape", *map(str, shape), "--tokens", str(tokens), "--dtype", dtype]
    command += ["--threads", str(threads), "--seed", str(seed), "--impl", *names]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"memory of {shape}, N {tokens}, {dtype}: {done.stderr.strip()[-200:]}", file=sys.stderr)
        return {}
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: None if peak is None else Peak(**peak) for name, peak in found.items()}
