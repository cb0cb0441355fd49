"""Abuse the program and say what it did: ``python scripts/fault_drill.py --output docs/results/faults.md``.

First every verb of fault_drill.yaml is killed at seeded random moments, looked at, and gone on with, and run twice at
once; then every fault of tests/support/faults.py is tried: hostile files, damaged weights, full disks, bad targets.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from support.drill import Drill, Outcome, Verb  # noqa: E402
from support.faults import FAULTS, MEMORY, Verdict, make_inputs  # noqa: E402
from support.nursery import Nursery  # noqa: E402


def kill_all(nursery: Nursery, inputs: dict[str, Path], folder: Path, verbs: list[Verb], points: int, seed: int):
    """Every verb killed `points` times."""
    drill = Drill(nursery, inputs, folder)
    outcomes = []
    for verb in verbs:
        for number in range(points):
            outcomes.append(drill.kill(verb, number, seed))
            said = "; ".join(outcomes[-1].problems) or "as it must be"
            print(f"{verb.name}, killed at {outcomes[-1].moment}: {said}", file=sys.stderr, flush=True)
    return outcomes, [drill.race(verb) for verb in verbs]


INTRODUCTION = """# Faults tried

`python scripts/fault_drill.py --points {points} --seed {seed}`, on tiny models. SIGKILL at {kills} random moments,
half of them by the clock, half at a change to the disk; {good} ended as they must: nothing, the earlier output or a
finished one lay there afterwards, the same command went on (with `--resume` where the verb has it) and gave the bytes
of a run that nobody disturbed, and nothing was left behind.
"""


def markdown(outcomes: list[Outcome], races: list[Outcome], verdicts: list[Verdict], points: int, seed: int) -> str:
    """The tables of docs/results/faults.md."""
    good = sum(not o.problems for o in outcomes)
    lines = [INTRODUCTION.format(points=points, seed=seed, kills=len(outcomes), good=good)]
    lines += ["| killed | times | what lay there | as it must be |", "|---|---:|---|---:|"]
    for verb in dict.fromkeys(o.verb for o in outcomes):
        own = [o for o in outcomes if o.verb == verb]
        left = ", ".join(f"{name} {count}" for name, count in Counter(o.left for o in own).most_common())
        lines.append(f"| `{verb}` | {len(own)} | {left} | {sum(not o.problems for o in own)} |")
    lines += ["", "| twice at once, one output | the second | as it must be |", "|---|---|---|"]
    lines += [f"| `{o.verb}` | {o.resumed} | {'**no**' if o.problems else 'yes'} |" for o in races]
    lines += ["", *(f"- {o.verb}, {o.moment}: {'; '.join(o.problems)}" for o in (*outcomes, *races) if o.problems)]
    survived = sum(v.survived for v in verdicts)
    lines += ["", f"Hostile or broken input and full disks: {survived} of {len(verdicts)} survived. Each process had"]
    lines += [f"{MEMORY / 2**30:.1f} GiB of address space beyond what it began with.", ""]
    lines += ["| fault | tried on | survived | what it said |", "|---|---|---|---|"]
    for v in verdicts:
        said = v.said.replace("|", "\\|")
        lines.append(f"| {v.fault.name} | `{v.fault.verb}` | {'yes' if v.survived else '**no**'} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Exit status 1 when something did not survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=12, help="kills of each verb")
    parser.add_argument("--verbs", type=Path, default=ROOT / "scripts" / "fault_drill.yaml", help="YAML file of verbs")
    parser.add_argument("--only", default="", help="names of verbs by commas; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="Markdown file for the tables")
    options = parser.parse_args()
    verbs = [v for v in Verb.read(options.verbs) if not options.only or v.name in options.only.split(",")]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, Nursery(Path(name) / "logs") as nursery:
        folder = Path(name)
        inputs = make_inputs(folder / "inputs", nursery)
        outcomes, races = kill_all(nursery, inputs, folder / "drill", verbs, options.points, options.seed)
        verdicts = [fault.run(nursery, inputs, folder / f"fault-{i}") for i, fault in enumerate(FAULTS)]
    text = markdown(outcomes, races, verdicts, options.points, options.seed)
    print(text)
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    return int(any(o.problems for o in (*outcomes, *races)) or not all(v.survived for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
