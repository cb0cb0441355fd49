"""SIGKILL at seeded random moments: never half of an output, and the same bytes in the end.

A handful of moments; ``scripts/fault_drill.py`` tries many more.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.drill import Drill, Verb
from support.scripts import SCRIPTS

VERBS = {verb.name: verb for verb in Verb.read(SCRIPTS / "fault_drill.yaml")}


@pytest.fixture(scope="module")
def drill(nursery, inputs, tmp_path_factory) -> Drill:
    return Drill(nursery, inputs, tmp_path_factory.mktemp("drill"))


@pytest.mark.parametrize(
    ("verb", "number"),
    [
        ("convert", 0),  # by the clock
        ("convert", 1),  # at a change to the disk
        ("convert --overwrite", 1),
        ("recover", 1),
        ("export", 1),
        ("export --overwrite", 1),
        ("frontier", 1),
        ("finetune", 1),
        ("prune", 1),
        ("extend", 1),
        ("tune", 1),
        ("pretrain", 1),
    ],
)
def test_killed_and_gone_on_with(verb, number, drill):
    outcome = drill.kill(VERBS[verb], number, seed=1)
    assert outcome.problems == [], outcome


@pytest.mark.parametrize("verb", ["convert", "export", "frontier"])
def test_two_processes_at_one_output(verb, drill):
    outcome = drill.race(VERBS[verb])
    assert outcome.problems == [], outcome


def test_the_drill_sees_a_half_finished_output(drill, tmp_path):
    """It would not be worth much if it could not fail."""
    verb = VERBS["convert"]
    wanted, _, _ = drill.reference(verb)
    output = tmp_path / "out"
    output.mkdir()
    (output / "config.json").write_text("{}")
    (tmp_path / "stray").mkdir()
    problems: list[str] = []
    assert drill._left(verb, output, wanted, None, problems) == "half of an output"
    assert problems == ["stray appeared", "a half-finished output"]


def test_what_a_killed_process_left_of_a_folder_is_removed_by_the_next(tmp_path):
    """And what a living one is writing is not."""
    from emoe.runtime import atomic_directory

    output = tmp_path / "dense"
    with atomic_directory(output) as living:
        dead = tmp_path / ".dense.abcdefgh.tmp"
        dead.mkdir()
        (dead / "model.safetensors").write_bytes(b"half")
        other = tmp_path / ".dense-2.abcdefgh.tmp"
        other.mkdir()
        with atomic_directory(output):
            pass
        assert living.is_dir()
        assert not dead.exists()
        assert other.is_dir()


def test_what_a_kill_behind_the_last_rename_leaves_is_removed(nursery, inputs, tmp_path):
    """The output is finished then, and its state, with a recovery's training states in it, is of no use."""
    from support.bench import convert

    output, state = tmp_path / "out", tmp_path / ".out.emoe-state"
    assert nursery.run(*convert(inputs["dense"], inputs, output)).status == 0
    (state / "training").mkdir(parents=True)
    (state / "training" / "optimizer.pt").write_bytes(b"large")
    done = nursery.run(*convert(inputs["dense"], inputs, output), "--resume")
    assert done.status == 0
    assert "is finished: nothing to go on with" in done.text
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_loses_no_earlier_output(nursery, inputs, tmp_path):
    from support.bench import convert
    from support.drill import contents

    output = tmp_path / "out"
    assert nursery.run(*convert(inputs["dense"], inputs, output)).status == 0
    before = contents(output)
    again = [*convert(inputs["dense"], inputs, output), "--overwrite", "--seed", "1"]
    assert nursery.run(*again, RLIMIT_FSIZE=16_000).refused
    assert contents(output) == before
    assert [p.name for p in Path(tmp_path).iterdir()] == ["out"]
