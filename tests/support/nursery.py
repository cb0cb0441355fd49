"""Runs of the command line in processes of their own, each forked within a millisecond from one that has imported
everything: so that a test can kill, starve and limit many of them.

As a program it reads requests, a JSON object a line, and answers each with a line: ``{"start": {...}}`` with a process
id, ``{"wait": pid}`` with an exit status (negative: the signal that ended it).
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
EVENTS = ("replace", "rename", "fsync", "unlink", "mkdir")
"""Calls of `os` that change what lies on the disk, at any of which a run can be made to die."""


@dataclass
class Done:
    """A run that has ended: exit status, and what it printed on either stream."""

    status: int
    text: str

    @property
    def complaints(self) -> list[str]:
        """Lines in which the program itself says what is wrong."""
        return [line for line in self.text.splitlines() if line.startswith("emoe: ")]

    @property
    def refused(self) -> bool:
        """Whether it ended as bad input must: status 2, one line, no traceback."""
        return self.status == 2 and len(self.complaints) == 1 and "Traceback" not in self.text


class Run:
    """A run under way."""

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self.nursery, self.pid, self.log = nursery, pid, log

    def kill(self) -> None:
        """SIGKILL; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Done:
        """Its end."""
        status = self.nursery.ask({"wait": self.pid})
        return Done(status, self.log.read_text(encoding="utf-8", errors="replace"))


class Nursery:
    """The process that runs are forked from; ``with Nursery(folder) as nursery``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Nursery:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")])
        # One thread: a forked process has none of its parent's, and OpenMP does not expect that.
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment["SOURCE_DATE_EPOCH"] = "0"  # model cards say when
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment
            | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}
            | {"EMOE_HOME": str(self.folder / "home")},
        )
        assert self.process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # it holds nothing, and takes its time to end by itself where the machine is busy
        self.process.wait()
        self.process.stdin.close()

    def ask(self, request: dict) -> int:
        """One request, one number."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, *arguments: object, die_at: int = 0, events: Path | None = None, **limits: int) -> Run:
        """Begin ``emoe ARGUMENTS``.

        Args:
            arguments: of the command line.
            die_at: number of the change to the disk before which it kills itself; 0 for never.
            events: file for the number of changes to the disk that it made.
            limits: soft limits by name of `resource`, such as ``RLIMIT_FSIZE=65536``, and ``memory``, bytes of address
                space beyond what the process has at its beginning.
        """
        self.count += 1
        log = self.folder / f"{self.count}.log"
        request = {"arguments": [str(a) for a in arguments], "log": str(log), "limits": limits, "die_at": die_at}
        pid = self.ask({"start": request | {"events": str(events) if events else None}})
        return Run(self, pid, log)

    def run(self, *arguments: object, **options: object) -> Done:
        """`start`, and wait for the end."""
        return self.start(*arguments, **options).wait()


def _serve() -> None:
    # What takes a run two seconds to import, and these none.
    import jinja2  # noqa: F401
    import sklearn.cluster  # noqa: F401
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    import emoe.conversion.convert
    import emoe.conversion.frontier
    import emoe.exporting.dense
    import emoe.finetuning.recover
    import emoe.finetuning.tune
    import emoe.pretraining.train
    import emoe.report.inspect
    import emoe.surgery.prune  # noqa: F401
    from emoe.cli.main import main

    transformers.utils.logging.set_verbosity_error()
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _be_child(request["start"], main)
        print(pid, flush=True)


def _be_child(request: dict, main) -> None:
    status = 70
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        counted = _count_events(request["die_at"])
        _limit(request["limits"])
        status = main(request["arguments"])
        if request["events"]:
            Path(request["events"]).write_text(str(counted[0]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _count_events(die_at: int) -> list[int]:
    counted = [0]

    def watched(call):
        def wrapper(*arguments, **keywords):
            counted[0] += 1
            if counted[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **keywords)

        return wrapper

    for name in EVENTS:
        setattr(os, name, watched(getattr(os, name)))
    return counted


def _limit(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        if name == "memory":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            name, value = "RLIMIT_AS", value + pages * resource.getpagesize()
        resource.setrlimit(getattr(resource, name), (value, resource.RLIM_INFINITY))


if __name__ == "__main__":
    _serve()
