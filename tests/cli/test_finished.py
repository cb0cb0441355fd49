"""What is finished is told from what another call would make; unfinished work is called by its kind."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from support.bench import ARCHITECTURE

from emoe.cli.main import main

LITTLE = ("--steps", 1, "--tokens-per-step", 64, "--held-out-tokens", 64, "--precision", "float32")


@pytest.fixture
def command(request, tiny_llama, converted_llama, text_file, tmp_path, monkeypatch):
    """Arguments of a verb that makes ``out`` in a second. Sequences are longer than the models' 128 positions."""
    monkeypatch.setenv("EMOE_HOME", str(tmp_path / "home"))
    (tmp_path / "new.yaml").write_text(yaml.safe_dump({"architecture": ARCHITECTURE, "vocabulary": 300}))
    dense, moe = ("--model", tiny_llama), ("--model", converted_llama)
    reading = ("--calibration", text_file, "--calibration-tokens", 512, "--held-out-tokens", 0)
    verbs = {
        "convert": (*dense, "--experts", 8, *reading, "--layers", 3),
        "tune": (*dense, "--text", text_file, *LITTLE),
        "recover": (*moe, "--text", text_file, *LITTLE),
        "analyze": (*moe, f"words={text_file}", "--tokens", 512, "--knock-out", 0),
        "pretrain": ("--config", tmp_path / "new.yaml", "--corpus", f"words={text_file}", *LITTLE),
    }
    length = 32 if request.param == "pretrain" else 256
    given = (request.param, *verbs[request.param], "--sequence-length", length, "--output", tmp_path / "out", "--quiet")
    return [str(word) for word in given]


VERBS = ("convert", "tune", "recover", "analyze", "pretrain")


@pytest.mark.parametrize("command", VERBS, indirect=True)
def test_finished_is_what_these_settings_made(command, tmp_path, capsys):
    assert main(command) == 0
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    same = {"convert": ["--cache-limit", "2"], "analyze": []}.get(command[0], ["--checkpoint-steps", "7"])
    assert main([*command, *same, "--resume"]) == 0
    assert "out is finished: nothing to go on with" in capsys.readouterr().err
    assert main([*command, "--seed", "7", "--resume"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("emoe: ")]
    assert "had other settings (seed: 0, now 7)" in line
    assert "--overwrite" in line
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == made


@pytest.mark.parametrize("command", ["tune"], indirect=True)
def test_a_setting_that_an_older_version_did_not_have(command, tmp_path, capsys):
    assert main(command) == 0
    path = tmp_path / "out" / "emoe_tune.json"
    report = json.loads(path.read_text())
    del report["settings"]["batch_sequences"]
    path.write_text(json.dumps(report))
    assert main([*command, "--resume"]) == 0
    assert main([*command, "--batch-sequences", "2", "--resume"]) == 2
    assert "(batch_sequences: 4, now 2)" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["recover"], indirect=True)
@pytest.mark.parametrize("kept", [None, [1], 7])
def test_a_record_without_settings(kept, command, tmp_path, capsys):
    assert main(command) == 0
    path = tmp_path / "out" / "emoe_recover.json"
    path.write_text(json.dumps({"settings": kept}))
    assert main([*command, "--resume"]) == 2
    assert "emoe_recover.json holds no settings" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["convert", "recover"], indirect=True)
def test_another_verbs_output_is_not_this_ones(command, converted_llama, text_file, tmp_path, capsys):
    """A pruned model has the settings of its conversion beside it."""
    pruning = ("prune", "--model", converted_llama, "--output", tmp_path / "out", "--keep", 0.5, "--method", "random")
    assert main([*map(str, pruning), "--quiet"]) == 0
    assert main([*command, "--resume"]) == 2
    kind, name = {"convert": ("conversion", "emoe_report.json"), "recover": ("recovery", "emoe_recover.json")}[
        command[0]
    ]
    assert f"out is no finished {kind}, it has no {name}; choose another --output" in capsys.readouterr().err


@pytest.mark.parametrize("command", VERBS[:3] + VERBS[4:], indirect=True)
def test_unfinished_work_is_called_by_its_kind(command, tmp_path, capsys):
    state = tmp_path / ".out.emoe-state"
    (state / "training" / "checkpoint-1").mkdir(parents=True)
    assert main(command) == 2
    kind = {"convert": "conversion", "recover": "recovery"}.get(command[0], "training")
    assert f"--output: an unfinished {kind} lies in" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [("prune", "--keep", "0.5", "--method", "random"), ("extend", "--experts", "1")])
def test_what_cannot_be_gone_on_with_names_no_resume(flags, converted_llama, tmp_path, capsys):
    (tmp_path / ".out.emoe-state" / "training" / "checkpoint-1").mkdir(parents=True)
    verb, *rest = flags
    assert main([verb, "--model", str(converted_llama), "--output", str(tmp_path / "out"), *rest, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert "--output: unfinished work lies in" in said
    assert "--resume" not in said


@pytest.mark.parametrize("verb", ["prune", "export"])
def test_what_a_kill_behind_the_last_rename_left_is_removed(verb, converted_llama, tmp_path, capsys):
    """Also by a call that then finds the finished output in its way."""
    flags = ["--model", str(converted_llama), "--output", str(tmp_path / "out"), "--quiet"]
    flags += ["--keep", "0.5", "--method", "random"] if verb == "prune" else ["--verify-tokens", "0"]
    assert main([verb, *flags]) == 0
    (tmp_path / ".out.emoe-state").mkdir()
    (tmp_path / ".out.emoe-replaced").mkdir()
    assert main([verb, *flags]) == 2
    assert "exists; choose another folder or add --overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", ["convert", "tune", "recover"], indirect=True)
def test_another_way_to_the_same_files(command, text_file, tmp_path, monkeypatch, capsys):
    assert main(command) == 0
    monkeypatch.chdir(text_file.parent)
    model = command[command.index("--model") + 1]
    elsewhere = [{model: f"{model}/", str(text_file): f"./{text_file.name}"}.get(word, word) for word in command]
    assert elsewhere != command
    assert main([*elsewhere, "--resume"]) == 0
    assert "out is finished" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["tune"], indirect=True)
def test_what_is_finished_needs_its_model_no_more(command, tiny_llama, tmp_path, capsys):
    shutil.copytree(tiny_llama, tmp_path / "dense")
    command[command.index("--model") + 1] = str(tmp_path / "dense")
    command[command.index("--sequence-length") + 1] = "64"
    assert main(command) == 0
    shutil.rmtree(tmp_path / "dense")
    assert main([*command, "--resume"]) == 0
    assert "out is finished" in capsys.readouterr().err
