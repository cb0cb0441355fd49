"""Abuse the program and say what it did: ``python scripts/fault_drill.py --output docs/results/faults.md``.

First every verb of fault_drill.yaml is killed at seeded random moments, looked at, and gone on with, and run twice at
once; then every fault of tests/support/faults.py is tried: hostile files, damaged weights, full disks, bad targets.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from stages import COMMIT  # noqa: E402
from support.drill import Drill, Verb  # noqa: E402
from support.faults import FAULTS, MEMORY, make_inputs  # noqa: E402
from support.nursery import Nursery  # noqa: E402


class Record:
    """What has been tried, a JSON line each: an interrupted drill goes on where it stood."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self.known = {tuple(entry["key"]): entry["found"] for entry in map(json.loads, lines)}

    def get(self, key: list, attempt: Callable[[], dict]) -> dict:
        """What is recorded under `key`, or what `attempt` gives now."""
        if tuple(key) not in self.known:
            self.known[tuple(key)] = found = attempt()
            if self.path:
                with open(self.path, "a") as file:
                    file.write(json.dumps({"key": key, "found": found}) + "\n")
            said = "; ".join(found.get("problems", [])) or found.get("said", "as it must be")
            print(*key, found.get("moment", ""), said, sep=" | ", file=sys.stderr, flush=True)
        return self.known[tuple(key)]


def drill(options: argparse.Namespace, record: Record, folder: Path) -> tuple[list, list, list]:
    """Kills, races and faults; see `Outcome` and `Verdict`."""
    verbs = [v for v in Verb.read(options.verbs) if not options.only or v.name in options.only.split(",")]
    with Nursery(folder / "logs") as nursery:
        inputs = make_inputs(folder / "inputs", nursery)
        drill = Drill(nursery, inputs, folder / "drill")
        kills = [
            record.get(["kill", options.seed, v.name, n], lambda v=v, n=n: asdict(drill.kill(v, n, options.seed)))
            for v in verbs
            for n in range(options.points)
        ]
        races = [record.get(["race", 0, v.name, 0], lambda v=v: asdict(drill.race(v))) for v in verbs]
        faults = []
        for number, fault in enumerate(FAULTS):
            if fault.why_not:
                print("not tried", fault.verb, fault.name, fault.why_not, sep=" | ", file=sys.stderr)
                continue
            place = folder / f"fault-{number}"
            try_it = lambda fault=fault, place=place: asdict(fault.run(nursery, inputs, place))  # noqa: E731
            faults.append(record.get(["fault", 0, fault.verb, fault.name], try_it))
    return kills, races, faults


INTRODUCTION = """# Faults tried

`python scripts/fault_drill.py --points {points} --seed {seed}`, commit {commit}, on tiny models.

SIGKILL at {kills} random moments, half of them by the clock, half at a change to the disk; {good} ended as they must:
nothing, the earlier output or a finished one lay there afterwards, the same command went on (with `--resume` where the
verb has it) and gave the bytes of a run that nobody disturbed, and nothing was left behind.
"""


def markdown(kills: list[dict], races: list[dict], faults: list[dict], points: int, seed: int) -> str:
    """The tables of docs/results/faults.md."""
    good = sum(not o["problems"] for o in kills)
    lines = [INTRODUCTION.format(points=points, seed=seed, kills=len(kills), good=good, commit=COMMIT)]
    lines += ["| killed | times | what lay there | as it must be |", "|---|---:|---|---:|"]
    for verb in dict.fromkeys(o["verb"] for o in kills):
        own = [o for o in kills if o["verb"] == verb]
        left = ", ".join(f"{name} {count}" for name, count in Counter(o["left"] for o in own).most_common())
        lines.append(f"| `{verb}` | {len(own)} | {left} | {sum(not o['problems'] for o in own)} |")
    lines += ["", "| twice at once, one output | the second | as it must be |", "|---|---|---|"]
    lines += [f"| `{o['verb']}` | {o['resumed']} | {'**no**' if o['problems'] else 'yes'} |" for o in races]
    bad = [o for o in (*kills, *races) if o["problems"]]
    lines += ["", *(f"- {o['verb']}, {o['moment']}: {'; '.join(o['problems'])}" for o in bad)]
    survived = sum(v["survived"] for v in faults)
    lines += ["", f"Hostile or broken input and full disks: {survived} of {len(faults)} survived. Each process had"]
    lines += [f"{MEMORY / 2**30:.1f} GiB of address space beyond what it began with.", ""]
    lines += ["| fault | tried on | survived | what it said |", "|---|---|---|---|"]
    for v in faults:
        said = v["said"].replace("|", "\\|")
        lines.append(f"| {v['fault']} | `{v['verb']}` | {'yes' if v['survived'] else '**no**'} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Exit status 1 when something did not survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=12, help="kills of each verb")
    parser.add_argument("--verbs", type=Path, default=ROOT / "scripts" / "fault_drill.yaml", help="YAML file of verbs")
    parser.add_argument("--only", default="", help="names of verbs by commas; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="file that keeps what was tried; a later drill goes on with it")
    parser.add_argument("--output", type=Path, help="Markdown file for the tables")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kills, races, faults = drill(options, Record(options.record), Path(folder))
    text = markdown(kills, races, faults, options.points, options.seed)
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    return int(any(o["problems"] for o in (*kills, *races)) or not all(v["survived"] for v in faults))


if __name__ == "__main__":
    sys.exit(main())
