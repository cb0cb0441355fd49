"""A grid of conversions: cells are files, an interrupted grid goes on, the table says what was measured."""

from __future__ import annotations

import json

import pytest

from emoe.cli.main import main


@pytest.fixture(scope="module")
def flags(tiny_llama, text_file):
    return [
        *("--model", str(tiny_llama), "--experts", "8", "--calibration", str(text_file)),
        *("--calibration-tokens", "2048", "--held-out-tokens", "256", "--sequence-length", "64"),
    ]


@pytest.fixture(scope="module")
def grid(flags, tmp_path_factory):
    """Every known method and two of a file's, at two budgets."""
    folder = tmp_path_factory.mktemp("frontier")
    (folder / "grid.yaml").write_text("compensated: {compensate: true}\nshared: {shared: 0.125}\n")
    command = ["frontier", *flags, "--methods", "all", "--grid", str(folder / "grid.yaml"), "--active", "0.25,0.75"]
    assert main([*command, "--held-out", "builtin-code", "--output", str(folder / "out"), "--quiet"]) == 0
    return folder, command


def test_every_cell_is_there(grid):
    folder, _ = grid
    report = json.loads((folder / "out" / "frontier.json").read_text())
    assert len(report["cells"]) == 2 * (7 + 2)
    assert list(report["dense"]) == ["calibration", "builtin-code"]
    for cell in report["cells"]:
        assert cell["active"] == pytest.approx(cell["wanted"], abs=0.12)
        assert all(found["ratio"] > 0 for found in cell["domains"].values())
    by_name = {(c["name"], c["wanted"]): c for c in report["cells"]}
    neurons = by_name["oracle of neurons", 0.25]
    assert neurons["experts"] == 48
    assert neurons["active"] == 0.25
    assert by_name["shared", 0.25]["settings"] == {"shared": 0.125}
    text = (folder / "out" / "frontier.md").read_text()
    assert "| oracle of neurons | 48 |" in text
    assert (folder / "out" / "frontier.png").stat().st_size > 10_000


def test_an_interrupted_grid_goes_on(grid, monkeypatch):
    """Only the cell that is missing is measured again, and comes out the same."""
    from emoe.conversion import frontier

    folder, command = grid
    before = json.loads((folder / "out" / "frontier.json").read_text())
    victim = sorted((folder / "out" / "cells").glob("emoe-25-*.json"))[0]
    victim.unlink()
    measured, measure = [], frontier._measure
    monkeypatch.setattr(frontier, "_measure", lambda *a: measured.append(a[1].slug) or measure(*a))
    assert main([*command, "--held-out", "builtin-code", "--output", str(folder / "out"), "--quiet"]) == 0
    assert measured == [victim.stem]
    after = json.loads((folder / "out" / "frontier.json").read_text())
    without_clock = lambda r: [{k: v for k, v in c.items() if k != "seconds"} for c in r["cells"]]  # noqa: E731
    assert without_clock(after) == without_clock(before)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--splits", "weights"], "--splits and --gates are crossed"),
        (["--splits", "weihgts", "--gates", "average-key"], "--split weihgts is unknown"),
        (["--methods", "moefication"], "did you mean 'MoEfication'?"),
        (["--active", "a"], "--active: 'a' is not a list of numbers"),
        (["--active", "1.5"], "--active: 1.5 is not a share"),
        (["--grid", "nowhere.yaml"], "--grid: cannot read nowhere.yaml"),
    ],
)
def test_bad_input(arguments, complaint, flags, tmp_path, capsys):
    assert main(["frontier", *flags, "--output", str(tmp_path / "out"), *arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("emoe: ")]
    assert len(error) == 1
    assert complaint in error[0]


def test_a_grid_with_an_unknown_setting(flags, tmp_path, capsys):
    (tmp_path / "g.yaml").write_text("x: {compensat: true}\n")
    assert main(["frontier", *flags, "--output", str(tmp_path / "o"), "--grid", str(tmp_path / "g.yaml")]) == 2
    assert "'x' has unknown setting 'compensat' (did you mean 'compensate'?)" in capsys.readouterr().err
