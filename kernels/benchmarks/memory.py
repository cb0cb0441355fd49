"""Peak memory of a forward pass above inputs, weights and output, for one case, each implementation in a fresh process.

Method: the resident set. After inputs and weights have been made and free heap pages returned (`malloc_trim`), the
kernel's high-water mark is reset (5 into /proc/self/clear_refs) and RSS read; the implementation then runs once, and
the figure is the mark (VmHWM) - RSS - bytes of the output; then the same again for a second call. The mark sees every
allocation that is written to: torch's, scratch memory of C++ and of BLAS, threads' stacks, a packed copy of the
weights. It does not see memory that is allocated and never touched. Two calls on a tiny layer with the same N come
first, so that code pages and thread pools are not counted. Resolution about 0.1 MiB. Linux only.

Weights are made once and the processes forked from there. That is safe because nothing has run in parallel before:
torch is held to one thread until the fork, so no thread pool exists that a child could miss.

    python kernels/benchmarks/memory.py --shape 2048 5632 64 16 --tokens 2048 --dtype bf16 --impl dense emoe
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from cases import DTYPES, Layer, Shape, make_inputs, make_layer, make_weights
from registry import Runner, by_name
from torch import Tensor


def status_bytes(name: str) -> int:
    """An entry of /proc/self/status that is given in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


class Subject(NamedTuple):
    """A layer with what goes into it."""

    layer: Layer
    x_ND: Tensor
    experts_NK: Tensor


def make_subject(shape: Shape, tokens: int, dtype: str, seed: int) -> Subject:
    """Random weights, tokens and routing."""
    layer = make_layer(make_weights(shape.width, shape.hidden, seed), shape.experts, dtype)
    inputs = make_inputs(shape, tokens, seed, None)
    return Subject(layer, inputs.x_ND.to(DTYPES[dtype]), inputs.routings[0])


def peak_mib(call: Callable[[], Tensor]) -> float:
    """MiB that a call needs above what is there before it and above its output."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    y = call()
    return round((status_bytes("VmHWM") - before - y.nbytes) / 2**20, 1)


def measure(runners: list[Runner], subjects: list[Subject], threads: int, out: Connection) -> None:
    """In the child: warm up on the tiny subject, measure two calls on the real one."""
    torch.set_num_threads(threads)
    (warm, runner), (tiny, subject) = runners, subjects
    with torch.no_grad():
        for _ in range(2):
            warm.call(tiny.x_ND, tiny.experts_NK)
        first, again = (peak_mib(lambda: runner.call(subject.x_ND, subject.experts_NK)) for _ in range(2))
    out.send({"first": first, "again": again})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=4, required=True, metavar=("D", "F", "E", "K"))
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--impl", nargs="+", choices=by_name(), required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    shape = Shape(*arguments.shape)
    tiny = Shape(64, 16 * shape.experts, shape.experts, shape.chosen)
    subjects = [make_subject(s, arguments.tokens, arguments.dtype, arguments.seed) for s in (tiny, shape)]
    fork = multiprocessing.get_context("fork")
    found = {}
    for name in arguments.impl:
        runners = [by_name()[name].prepare(s.layer) for s in subjects]
        receive, send = fork.Pipe(duplex=False)
        child = fork.Process(target=measure, args=(runners, subjects, arguments.threads, send))
        child.start()
        send.close()
        try:
            found[name] = receive.recv()
        except EOFError:  # it crashed, or the system ended it; its own message is on standard error
            print(f"{name}: the process died", file=sys.stderr)
            found[name] = None
        child.join()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
