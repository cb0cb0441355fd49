"""Conversions that kill themselves (SIGKILL) at the n-th write, each forked from one process that has imported all.

As a program it reads a JSON object a line, ``{"when": "after-rename", "number": 4, "settings": {...}}``, runs that
conversion and answers with its exit status (negative: the signal that ended it).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def killer() -> Iterator[Callable[[str, int, dict], int]]:
    """``kill("after-rename", 4, settings)`` → exit status of a conversion that dies there, or does not."""
    # One thread: a forked process has none of its parent's, and OpenMP does not expect that.
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )

    def kill(when: str, number: int, settings: dict) -> int:
        process.stdin.write(json.dumps({"when": when, "number": number, "settings": settings}) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    try:
        yield kill
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


def _serve() -> None:
    import sklearn.cluster  # noqa: F401
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    import emoe.conversion.convert  # noqa: F401

    transformers.utils.logging.set_verbosity_error()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _convert(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _convert(when: str, number: int, settings: dict) -> None:
    import emoe
    from emoe.conversion import layer

    count = [0]

    def die_at(name: str) -> None:
        if name == when:
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    replace, reorder = os.replace, layer.reorder

    def dying_replace(source, target):
        die_at("before-rename")
        replace(source, target)
        die_at("after-rename")

    def dying_reorder(*arguments):
        die_at("inside-layer")
        return reorder(*arguments)

    status = 70
    signal.alarm(120)  # a child that hangs ends, too
    try:
        os.dup2(2, 1)  # standard output is for answers
        os.replace, layer.reorder = dying_replace, dying_reorder
        emoe.convert(**settings)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    _serve()
