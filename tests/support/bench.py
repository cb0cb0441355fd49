"""Where faults are tried: inputs to be damaged, and what the program must say to each.

Each is tried in a process that may take 1.5 GiB beyond what it begins with: what is refused must be refused before the
memory for it is taken.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml
from support.labelled import write_task
from support.nursery import Nursery
from support.tiny import TEXT, tiny_checkpoint

from emoe.pretraining.text import PIECE

MEMORY = 3 << 29
SHORT = ["--experts", "8", "--calibration-tokens", "2048", "--held-out-tokens", "0", "--sequence-length", "64"]

ARCHITECTURE = {
    "model_type": "moduleformer",
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "att_hidden": 8,
    "ffd_hidden": 16,
    "gating_size": 8,
    "n_att_experts": 4,
    "n_mlp_experts": 4,
}
"""Of the model that `emoe pretrain` begins with."""


def make_inputs(folder: Path, nursery: Nursery) -> dict[str, Path]:
    """A dense checkpoint, a converted one and its export, two texts, a labelled task, a new architecture; by name."""
    folder.mkdir(parents=True)
    inputs = {
        "dense": tiny_checkpoint(folder / "dense"),
        "text": folder / "text.txt",
        "long_text": folder / "long.txt",
        "converted": folder / "converted",
        "exported": folder / "exported",
        "task": write_task(folder / "task"),
        "architecture": folder / "architecture.yaml",
    }
    inputs["architecture"].write_text(yaml.safe_dump({"architecture": ARCHITECTURE}))
    inputs["text"].write_text(TEXT * 60)
    inputs["long_text"].write_text(TEXT * (4 * PIECE // len(TEXT)))  # pieces for training and one that is held out
    conversion = [*convert(inputs["dense"], inputs, inputs["converted"]), "--held-out-tokens", 256]
    export = ["export", "--model", inputs["converted"], "--output", inputs["exported"], "--to", "dense"]
    for arguments in (conversion, [*export, "--verify-tokens", 64]):
        done = nursery.run(*arguments)
        assert done.status == 0, done.text
    return inputs


def convert(model: Path, inputs: dict[str, Path], output: Path) -> list[str]:
    """Arguments of a short conversion."""
    return ["convert", "--model", str(model), "--output", str(output), "--calibration", str(inputs["text"]), *SHORT]


@dataclass
class Bench:
    """Where one fault is tried."""

    place: Path
    inputs: dict[str, Path]
    undo: ExitStack

    def copy(self, name: str) -> Path:
        """A copy of an input, to be damaged."""
        return Path(shutil.copytree(self.inputs[name], self.place / name))

    @property
    def output(self) -> Path:
        """What the run is told to write."""
        return self.place / "out"


@cache
def can_mount() -> bool:
    """Whether this process may mount file systems."""
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Fault:
    """A fault and the answer that is right."""

    name: str
    verb: str
    arguments: Callable[[Bench], list[str]]
    """Does the damage; returns the command line."""
    answer: str | None
    """Regular expression of the one line that refuses it; None if it has to work."""
    limits: dict[str, int] = field(default_factory=dict)
    mounts: bool = False
    """It needs a file system of its own."""

    @property
    def why_not(self) -> str:
        """Why it cannot be tried here; nothing if it can."""
        return "only root may mount a small file system" if self.mounts and not can_mount() else ""

    def run(self, nursery: Nursery, inputs: dict[str, Path], place: Path) -> Verdict:
        """Try it."""
        place.mkdir(parents=True)
        with ExitStack() as undo:
            bench = Bench(place, inputs, undo)
            arguments = self.arguments(bench)
            done = nursery.run(*arguments, memory=MEMORY, **self.limits)
            said = done.complaints[0].removeprefix("emoe: ") if done.complaints else done.text.strip()[-300:]
            if self.answer is None:
                survived = done.status == 0
                said = "done" if survived else said
            else:
                survived = done.refused and bool(re.search(self.answer, said)) and not bench.output.exists()
        said = re.sub(rf"{re.escape(str(place))}/|{re.escape(str(inputs['dense'].parent))}/", "", said)
        shutil.rmtree(place)
        return Verdict(self.name, self.verb, survived, said if len(said) < 200 else said[:200] + "…")


@dataclass(frozen=True)
class Verdict:
    """What came of a fault."""

    fault: str
    verb: str
    survived: bool
    said: str


FAULTS: list[Fault] = []
"""All that `fault` was told of, in the order in which files are imported."""


def fault(name: str, verb: str, answer: str | None, *, mounts: bool = False, **limits: int) -> Callable:
    """Decorates what does the damage and returns the command line; see `Fault`."""

    def add(arguments: Callable[[Bench], list[str]]) -> Callable:
        FAULTS.append(Fault(name, verb, arguments, answer, limits, mounts))
        return arguments

    return add
