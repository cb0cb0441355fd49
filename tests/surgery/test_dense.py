"""A stock model that pruning or training has written is ours: replaced when told, told of when asked."""

from __future__ import annotations

import json

import pytest

from emoe.cli.main import main


@pytest.fixture
def training(text_file):
    return (
        *("--text", text_file, "--steps", 1, "--tokens-per-step", 64, "--sequence-length", 64),
        *("--held-out-tokens", 64, "--precision", "float32"),
    )


@pytest.fixture
def pruning(text):
    return (*text, "--keep", 0.5, "--method", "magnitude")


@pytest.mark.parametrize("verb", ["prune", "tune"])
def test_it_is_replaced_when_told(verb, run, converted_llama, tiny_llama, training, pruning, tmp_path, capsys):
    model, flags = (converted_llama, pruning) if verb == "prune" else (tiny_llama, training)
    folder = run(verb, model, "dense", *flags)
    assert main([verb, "--model", str(model), "--output", str(folder), *map(str, flags)]) == 2
    assert "exists; choose another folder or add --overwrite" in capsys.readouterr().err
    run(verb, model, "dense", *flags, "--overwrite")
    if verb == "tune":
        run("tune", model, "dense", *flags, "--resume")
        assert "is finished: nothing to go on with" in capsys.readouterr().err
    (folder / f"emoe_{verb}.json").unlink()
    assert main([verb, "--model", str(model), "--output", str(folder), *map(str, flags), "--overwrite"]) == 2
    assert "is not a checkpoint of ours" in capsys.readouterr().err


def test_its_history_goes_on(run, converted_llama, training, pruning, tmp_path, capsys):
    """In the reports: config.json stays a stock one."""
    pruned = run("prune", converted_llama, "pruned", *pruning)
    tuned = run("tune", pruned, "tuned", *training)
    again = run("tune", tuned, "again", *training)
    assert "emoe" not in (again / "config.json").read_text()
    source = json.loads((converted_llama / "config.json").read_text())["emoe_provenance"]
    provenance = json.loads((again / "emoe_tune.json").read_text())["provenance"]
    steps = provenance.pop("history")
    assert [step["verb"] for step in steps] == ["prune", "tune", "tune"]
    assert len({step["from_digest"] for step in steps}) == 3
    assert provenance == source
    capsys.readouterr()
    assert main(["inspect", str(again), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "llama, a dense model" in shown
    assert [f"history {number}" in shown for number in (1, 2, 3, 4)] == [True, True, True, False]
    assert "1 are as they were written" in shown
    assert "3. tune" in (again / "README.md").read_text()
    assert main(["report", str(again), "--html", str(tmp_path / "page.html"), "--quiet"]) == 0
    assert "a dense model" in (tmp_path / "page.html").read_text()


def test_a_damaged_history_is_one_line(run, tiny_llama, training, capsys):
    tuned = run("tune", tiny_llama, "tuned", *training)
    path = tuned / "emoe_tune.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"provenance": {"history": [{"verb": 3}]}}))
    assert main(["inspect", str(tuned)]) == 2
    assert f"inspect: {path}: history.0.verb" in capsys.readouterr().err
