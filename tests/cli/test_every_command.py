"""What holds for every command, whoever adds one: help, --quiet, --json, one line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import typer
from rich.console import Console
from support.commands import LONG, commands, runs

from emoe.assets.corpora import CORPORA
from emoe.cli.main import app, main
from emoe.cli.progress import progress_bar
from emoe.config import AnalyzeConfig, ConvertConfig, PruneConfig, TuneConfig, flag_of

COMMANDS = typer.main.get_command(app).commands
DOCS = Path(__file__).parents[2] / "docs"


def options(command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_read_by_programs(name):
    assert {"--quiet", "--json"} <= options(COMMANDS[name])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_says_what_it_is(name):
    command = COMMANDS[name]
    assert command.help
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert parameter.help, f"{name} {parameter.opts}"


@pytest.mark.parametrize(
    ("name", "settings"),
    [("prune", PruneConfig), ("tune", TuneConfig), ("convert", ConvertConfig), ("analyze", AnalyzeConfig)],
)
def test_values_to_choose_from_are_named(name, settings, capsys):
    """And what is on by default can be switched off."""
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    fields = settings.model_fields.items()
    parts = [(flag_of(key), part) for key, field in fields for part in (field.annotation, *get_args(field.annotation))]
    literals = {flag: get_args(part) for flag, part in parts if get_origin(part) is Literal}
    assert literals or name == "analyze"
    for flag, values in literals.items():
        assert f"{flag} {'|'.join(map(str, values))}" in shown
    for key, field in fields:
        assert (f"--no-{flag_of(key)[2:]}" in shown) == (field.default is True)


@pytest.mark.parametrize("name", ["convert", "frontier", "pretrain"])
def test_built_in_corpora_are_named(name, capsys):
    assert main([name, "--help"]) == 0
    assert ", ".join(CORPORA) in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["recover", "tune", "analyze", "prune", "extend", "export", "report"])
def test_flags_of_texts_name_a_built_in_corpus(name, capsys):
    """And where the names are."""
    assert main([name, "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert any(f"corpus:{corpus}" in shown for corpus in CORPORA)
    assert "as for `emoe convert --calibration`" in shown


def test_the_page_on_texts_lists_the_built_in_corpora():
    page = (DOCS / "converting.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `corpus:(\w+)` \| (.*?) \|", page, re.MULTILINE)
    assert rows == [(corpus.name, corpus.summary) for corpus in CORPORA.values()]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_one_line(name, capsys):
    assert main([name, "--no-such-option", "1"]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("emoe: ")]) == 1


NAMES = (
    *("convert", "export", "inspect", "estimate", "models", "doctor", "fetch", "report"),
    *("extend", "prune", "compare", "sweep"),
)


@pytest.mark.parametrize("name", NAMES)
def test_json_is_all_that_is_on_standard_output(name, converted_llama, tiny_llama, text_file, tmp_path, capfd):
    arguments = commands(converted_llama, tiny_llama, text_file, tmp_path)[name]
    capfd.readouterr()
    assert main([name, *arguments, "--json"]) == 0
    assert isinstance(json.loads(capfd.readouterr().out), dict | list)


BY_A_TEST_OF_ITS_OWN = ("eval", "push")


def test_every_command_is_tried_with_json():
    """The long ones in test_progress.py."""
    assert {*NAMES, *LONG, *BY_A_TEST_OF_ITS_OWN} == set(COMMANDS)


def test_a_comparison_in_a_file_and_as_json(tmp_path, capsys):
    arguments = ["compare", str(runs(tmp_path, "vanilla")), str(runs(tmp_path, "emoe")), "--resamples", "100", "--json"]
    assert main([*arguments, "--output", str(tmp_path / "c.csv")]) == 0
    assert json.loads(capsys.readouterr().out)["baseline"] == "vanilla"
    assert (tmp_path / "c.csv").read_text().startswith("run,")
    assert main([*arguments, "--format", "csv"]) == 2
    assert "--json: standard output has room for one format" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_quiet_prints_no_table(name, converted_llama, tiny_llama, text_file, tmp_path, capfd):
    arguments = commands(converted_llama, tiny_llama, text_file, tmp_path)[name]
    capfd.readouterr()
    assert main([name, *arguments, "--quiet"]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    wanted = {"models": "smollm2-135m", "fetch": str(tiny_llama)}.get(name)  # their answer is no table
    assert (wanted in captured.out) if wanted else (captured.out == "")


@pytest.mark.parametrize("name", ["convert", "estimate", "prune"])
def test_of_several_processes_one_speaks(name, converted_llama, tiny_llama, text_file, tmp_path, capfd, monkeypatch):
    """Errors too."""
    monkeypatch.setenv("RANK", "1")
    arguments = commands(converted_llama, tiny_llama, text_file, tmp_path)[name]
    capfd.readouterr()
    assert main([name, *arguments, "--json"]) == 0
    assert main([name, "--json"]) == 2
    assert capfd.readouterr() == ("", "")


def test_doctor_knows_the_disk(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cache"]["free_bytes"] > 0
    assert os.getcwd() in found["free_disk_bytes"]
    assert found["versions"]["safetensors"]
    assert main(["doctor"]) == 0
    assert "free disk:" in capsys.readouterr().out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell):
    """typer's: ``emoe --install-completion``."""
    environment = {**os.environ, "_EMOE_COMPLETE": f"source_{shell}"}
    done = subprocess.run([sys.executable, "-m", "emoe"], env=environment, capture_output=True, text=True)
    assert "_EMOE_COMPLETE" in done.stdout, done.stderr


def test_completion_of_a_command():
    words = {"COMP_WORDS": "emoe conv", "COMP_CWORD": "1", "_EMOE_COMPLETE": "complete_bash"}
    done = subprocess.run([sys.executable, "-m", "emoe"], env={**os.environ, **words}, capture_output=True, text=True)
    assert done.stdout.split() == ["convert"]


def test_a_terminal_shows_time_left(monkeypatch):
    """Even when a step takes a minute, which rich by itself would forget before the next."""
    import io

    import rich.progress

    now, screen = [0.0], io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    make = rich.progress.Progress
    monkeypatch.setattr(
        rich.progress,
        "Progress",
        lambda *columns, **options: make(
            *columns,
            **options | {"get_time": lambda: now[0], "console": Console(file=screen, width=160, force_terminal=True)},
            auto_refresh=False,
        ),
    )
    with progress_bar(quiet=False) as show:
        for done in range(4):
            show("clustering", done, 10)
            now[0] += 60
        bar = show.__closure__[0].cell_contents
        bar.refresh()
    assert "0:07:00" in screen.getvalue()


def test_lines_show_time_left(monkeypatch, capsys):
    from emoe.cli import progress

    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress_bar(quiet=False) as show:
        now[0] += 30
        show("clustering", 3, 9)
    assert "3/9 layers, clustering, 30 s, about 60 s left" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "counted"), [((), "7/7 layers in two passes, done"), (("--preset", "finetune"), "4/4 layers, done")]
)
def test_a_conversion_says_how_often_it_counts_layers(flags, counted, tiny_llama, text_file, tmp_path, capsys):
    """The survey ends with the last converted one of the four, the second pass with the model."""
    reading = ("--calibration-tokens", "2048", "--held-out-tokens", "0", "--sequence-length", "64")
    given = ["--experts", "8", "--layers", "0,2", "--calibration", str(text_file), *reading, *flags]
    assert main(["convert", "--model", str(tiny_llama), "--output", str(tmp_path / "out"), *given]) == 0
    assert counted in capsys.readouterr().err


def test_a_report_on_runs_counts_domains(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("emoe.cli.progress.LINE_SECONDS", 0.0)
    both = [str(runs(tmp_path, "vanilla")), str(runs(tmp_path, "emoe"))]
    assert main(["report", *both, "--html", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr().err
    assert re.search(r"\d/\d domains, reading ", said)
    assert " layers, " not in said


def test_each_stage_counts_its_own(monkeypatch, capsys):
    """Sets are no steps, and take their own time; so does the next seed."""
    from emoe.cli import progress

    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress_bar(False, "steps", progress.FINETUNING) as show:
        for stage, done, total in (
            *(("cutting: split", 1, 2), ("seed 0", 3, 6), ("seed 0", 6, 6)),
            *(("scoring far, dense", 0, 4), ("scoring own, dense", 1, 4), ("seed 1", 2, 6), ("seed 1", 3, 6)),
        ):
            now[0] += 20
            show(stage, done, total)
    assert [line.strip() for line in capsys.readouterr().err.splitlines()] == [
        "1/2 layers, cutting: split, 20 s, about 20 s left",
        "3/6 steps, seed 0, 40 s, about 20 s left",
        "6/6 steps, seed 0, 60 s",
        "0/4 sets, scoring far, dense, 80 s",
        "1/4 sets, scoring own, dense, 100 s, about 60 s left",
        "2/6 steps, seed 1, 120 s, about 40 s left",
        "3/6 steps, seed 1, 140 s, about 40 s left",
    ]


@pytest.mark.parametrize(
    ("arguments", "place", "hint"),
    [
        (["finetune"], "emoe.cli.finetune.merge_settings", "; --resume goes on with unfinished work"),
        (["sweep", "x.yaml"], "emoe.evaluation.sweep_config.read_sweep", "; the same command goes on"),
        (["compare", "a", "b"], "emoe.evaluation.runs.read_runs", "interrupted\n"),
        (["eval", "--model", "a"], "emoe.cli.evaluate.find_run", "interrupted\n"),
    ],
)
def test_an_interruption_names_the_way_on(arguments, place, hint, monkeypatch, capsys):
    def stop(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, stop)
    assert main(arguments) == 130
    assert hint in capsys.readouterr().err
