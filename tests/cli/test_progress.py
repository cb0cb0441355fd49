"""Every long command, on a terminal and not: a bar with time left, none with --quiet, JSON alone with --json."""

from __future__ import annotations

import io
import itertools
import json
import re
import sys

import huggingface_hub
import pytest
import rich.progress
from rich.console import Console
from support.commands import LONG, long_commands
from support.trainer import FakeTrainer

from emoe.cli.main import main

BAR = re.compile(r"(\d+)/(\d+) [\w% ]+? +\d+:\d\d:\d\d left (\d+:\d\d:\d\d)")
SILENT_WITH_JSON = ("inspect", "fetch")
"""Commands whose JSON is the answer to a question; others show how far they are beside it."""


@pytest.fixture
def screen(monkeypatch):
    """What a terminal would show: drawn at every step, each glance at the clock a second after the last."""
    text, clock, plain = io.StringIO(), itertools.count(), rich.progress.Progress
    text.isatty = lambda: True

    class Eager(plain):
        def __init__(self, *columns, **options):
            console = Console(file=text, width=200, force_terminal=True, color_system=None)
            options |= {"console": console, "auto_refresh": False, "get_time": lambda: float(next(clock))}
            super().__init__(*columns, **options)

        def update(self, *arguments, **fields):
            super().update(*arguments, **fields, refresh=True)

    monkeypatch.setattr(rich.progress, "Progress", Eager)
    return text


@pytest.fixture
def far_things(tmp_path, monkeypatch):
    """A hub, trainings of a sweep, and large files: small ones in smaller units."""

    def snapshot_download(repo_id, tqdm_class, **options):
        bar = tqdm_class(name="huggingface_hub.snapshot_download", unit="B", total=5000)
        for _ in range(5):
            bar.update(1000)
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors").write_text("")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr("emoe.bytecount.MIB", 1 << 10)
    monkeypatch.setattr("emoe.evaluation.sweep._finetune", FakeTrainer)


@pytest.fixture
def watched(screen, capfd, monkeypatch):
    """``watched(name, quiet, loud, json)``: a call of a command, in folders of its own, for each way of running it."""

    def run(name, quiet, loud, alone):
        monkeypatch.setattr(sys, "stderr", screen)
        capfd.readouterr()
        assert main([name, *quiet, "--quiet"]) == 0, screen.getvalue()
        captured = capfd.readouterr()
        assert screen.getvalue() == captured.err == ""
        assert captured.out.count("\n") == (name == "fetch")  # a folder
        if name in SILENT_WITH_JSON:
            assert main([name, *alone, "--json"]) == 0, screen.getvalue()
            assert not BAR.search(screen.getvalue())
            assert json.loads(capfd.readouterr().out)
            assert main([name, *loud]) == 0, screen.getvalue()
        else:
            assert main([name, *loud, "--json"]) == 0, screen.getvalue()
            assert json.loads(capfd.readouterr().out)
        left = {found[3] for found in BAR.finditer(screen.getvalue()) if int(found[1]) < int(found[2])}
        assert left - {"0:00:00"}, screen.getvalue()
        screen.truncate(screen.seek(0))

    return run


@pytest.mark.parametrize("name", LONG)
def test_a_long_command(name, watched, far_things, converted_llama, tiny_llama, text_file, tmp_path):
    places = [tmp_path / place for place in ("quiet", "loud", "json")]
    for place in places:
        place.mkdir()
    watched(name, *(long_commands(converted_llama, tiny_llama, text_file, place)[name] for place in places))
    if name == "finetune":
        runs = [["--model", str(place / name / "seed-0")] for place in places[:2]]
        watched("eval", *([*run, "--domains", "own,far,own-validation"] for run in runs), [])
