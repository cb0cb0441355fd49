"""Run a conversion that kills itself (SIGKILL) at the n-th write: ``python killer.py WHEN N SETTINGS.json``."""

from __future__ import annotations

import json
import os
import signal
import sys


def main() -> None:
    when, number, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
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

    os.replace, layer.reorder = dying_replace, dying_reorder
    with open(path) as file:
        emoe.convert(**json.load(file))


if __name__ == "__main__":
    main()
