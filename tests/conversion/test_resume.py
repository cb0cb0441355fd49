"""Repeatable from the seed, and from any point at which it was killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.killer import killer

import emoe
from emoe.conversion.workspace import STATE, Workspace
from emoe.distributed import Group
from emoe.errors import UserError

RUN_FACTS = {"emoe_report.json"}
"""Files that hold the times of one run."""


@pytest.fixture(scope="module")
def kill():
    with killer() as run:
        yield run


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes; of the report, what does not depend on the clock."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name in RUN_FACTS:
            report = json.loads(path.read_text())
            found[path.name] = json.dumps({k: v for k, v in report.items() if k not in ("seconds", "peak_bytes")})
        elif path.is_file():
            found[path.name] = path.read_bytes()
    return found


def test_same_seed_same_bytes_and_another_seed_another_partition(tiny_llama, settings, converted_llama, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        emoe.convert(str(tiny_llama), output=tmp_path / name, **(settings | {"seed": seed}))
    original, same, other = (contents(f) for f in (converted_llama, tmp_path / "same", tmp_path / "other"))
    assert same == original
    assert other["partition.safetensors"] != original["partition.safetensors"]


# Writes of a tiny conversion: 1 shard for the ends, 2 for the state of each of the survey's 4 layers, then for each
# layer 1 shard and 2 for the state, then the end's files.
POINTS = [
    ("before-rename", 1),  # nothing is there yet
    ("after-rename", 4),  # the survey has seen layer 1, its state tensors are not yet named by the state
    ("after-rename", 9),  # the survey is complete
    ("after-rename", 10),  # layer 0 written, no state
    ("inside-layer", 7),  # in the middle of layer 2
    ("before-rename", 14),  # state tensors of layer 1 written, not yet named by the state
    ("after-rename", 18),  # layer 2 done, its state complete
    ("before-rename", 23),  # all layers done, the index is due
    ("after-rename", 30),  # among the last files
]


@pytest.mark.parametrize(("when", "number"), POINTS)
def test_killed_and_resumed_gives_the_same_bytes(when, number, kill, tiny_llama, settings, converted_llama, tmp_path):
    output = tmp_path / "out"
    arguments = {"model": str(tiny_llama), "output": str(output), **settings}
    assert kill(when, number, arguments) == -signal.SIGKILL
    assert not output.exists()
    emoe.convert(resume=True, **arguments)
    assert contents(output) == contents(converted_llama)
    assert [p.name for p in tmp_path.iterdir() if "emoe" in p.name] == []


def test_an_unfinished_conversion_is_neither_lost_nor_mixed_up(kill, tiny_llama, settings, tmp_path):
    arguments = {"model": str(tiny_llama), "output": str(tmp_path / "out"), **settings}
    assert kill("after-rename", 14, arguments) == -signal.SIGKILL
    with pytest.raises(UserError, match="add --resume to go on with it or --overwrite"):
        emoe.convert(**arguments)
    with pytest.raises(UserError, match=r"--resume: the unfinished conversion had other settings \(seed: 0, now 7\)"):
        emoe.convert(resume=True, **(arguments | {"seed": 7}))
    emoe.convert(overwrite=True, **(arguments | {"seed": 7}))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["emoe_provenance"]["seed"] == 7


def test_an_existing_output_survives_until_the_new_one_is_whole(tiny_llama, settings, tmp_path, monkeypatch):
    """Refused without --overwrite; with it, a disk that fills up leaves source and earlier output as they were."""
    output, fast = tmp_path / "out", settings | {"held_out_tokens": 0}
    emoe.convert(str(tiny_llama), output=output, **fast)
    earlier, source = contents(output), contents(tiny_llama)
    with pytest.raises(UserError, match="exists; choose another folder or add --overwrite"):
        emoe.convert(str(tiny_llama), output=output, **fast)

    import emoe.checkpoint.writer as writer

    save, count = writer.save_file, [0]

    def full_disk(*arguments, **keywords):
        count[0] += 1
        if count[0] == 4:
            raise OSError(28, "No space left on device")
        save(*arguments, **keywords)

    monkeypatch.setattr(writer, "save_file", full_disk)
    with pytest.raises(UserError, match=r"No space left on device.*untouched"):
        emoe.convert(str(tiny_llama), output=output, overwrite=True, **(fast | {"seed": 3}))
    assert contents(output) == earlier
    assert contents(tiny_llama) == source
    monkeypatch.undo()
    emoe.convert(str(tiny_llama), output=output, overwrite=True, resume=True, **(fast | {"seed": 3}))
    assert contents(output) != earlier


def test_a_kill_while_unfinished_work_is_removed(tmp_path, monkeypatch):
    """Its state must not speak of shards that have gone."""
    workspace = Workspace(tmp_path / "out", None, resume=False, overwrite=True)
    for folder in (workspace.folder, workspace.state_folder):
        folder.mkdir()
    (workspace.state_folder / STATE).write_text("{}")

    def cut(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut)
    with pytest.raises(KeyboardInterrupt), workspace.open(Group()):
        pass
    assert not (workspace.state_folder / STATE).exists()


def test_two_processes_do_not_share_an_output(tiny_llama, settings, tmp_path):
    import fcntl

    for name in ("state", "partial"):
        (tmp_path / f".out.emoe-{name}").mkdir()
    (tmp_path / ".out.emoe-partial" / "shard").write_text("of the other process")
    with open(tmp_path / ".out.emoe-state" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for how in ("resume", "overwrite"):
            with pytest.raises(UserError, match="another process is writing"):
                emoe.convert(str(tiny_llama), output=tmp_path / "out", **{how: True}, **settings)
    assert (tmp_path / ".out.emoe-partial" / "shard").exists()


def test_overwrite_touches_nothing_but_a_converted_checkpoint(tiny_llama, settings, tmp_path):
    """Neither the model itself, nor a folder around it, nor somebody's pictures."""
    source = Path(shutil.copytree(tiny_llama, tmp_path / "models" / "llama"))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "cat.png").write_bytes(b"cat")
    before = contents(tmp_path)
    for output, complaint in (
        (source, "overlaps the model's own folder"),
        (source.parent, "overlaps the model's own folder"),
        (source / "inside", "overlaps the model's own folder"),
        (tmp_path / "pictures", "is not a checkpoint of ours, --overwrite will not touch it"),
    ):
        with pytest.raises(UserError, match=complaint):
            emoe.convert(str(source), output=output, overwrite=True, **settings)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kill", [False, True])
def test_a_last_rename_that_fails_loses_nothing(kill, tiny_llama, settings, converted_llama, tmp_path, monkeypatch):
    """The conversion was whole: --resume finishes it; until then the earlier output is where it was."""
    output, arguments = tmp_path / "out", settings | {"overwrite": True}
    emoe.convert(str(tiny_llama), output=output, **(settings | {"seed": 5}))
    earlier = contents(output)
    rename = os.rename

    class Killed(BaseException):
        """Stands for SIGKILL: nothing of ours may catch it."""

    def failing(source, target):
        if Path(target) == output and "partial" in str(source):
            raise Killed if kill else OSError(16, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(Killed if kill else UserError):
        emoe.convert(str(tiny_llama), output=output, **arguments)
    monkeypatch.undo()
    if not kill:
        assert contents(output) == earlier
    emoe.convert(str(tiny_llama), output=output, resume=True, **arguments)
    assert contents(output) == contents(converted_llama)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_disk_that_is_really_full(tiny_llama, settings, tmp_path):
    """Files may not grow past 40 kB (RLIMIT_FSIZE): one line, source untouched, nothing that looks like an output."""
    code = """
        import resource, signal, sys
        from emoe.cli.main import main
        import emoe.conversion.convert, transformers, matplotlib
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        sys.exit(main(sys.argv[1:]))
    """
    before = contents(tiny_llama)
    flags = ["--experts", "8", "--calibration", settings["calibration"][0], "--calibration-tokens", "2048"]
    command = [sys.executable, "-c", textwrap.dedent(code), "convert", "--model", str(tiny_llama), *flags]
    command += ["--output", str(tmp_path / "out"), "--sequence-length", "64", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(done.stderr.strip().splitlines()) == 1
    assert "--output: cannot write" in done.stderr
    assert not (tmp_path / "out").exists()
    assert contents(tiny_llama) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_somebody_puts_there_meanwhile_stays(overwrite, tiny_llama, settings, tmp_path):
    output = tmp_path / "out"

    def putting(stage, done, total):
        output.mkdir(exist_ok=True)
        (output / "precious.txt").write_text("theirs")

    with pytest.raises(UserError, match=r"somebody has written .*out meanwhile"):
        emoe.convert(str(tiny_llama), output=output, overwrite=overwrite, progress=putting, **settings)
    assert [path.name for path in output.iterdir()] == ["precious.txt"]
