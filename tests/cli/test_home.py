"""``~`` is the user's home for every verb, where the shell has left it alone: within quotes, behind ``=``, in files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import typer

import emoe
from emoe.calibration.text import check_source
from emoe.cli.main import app, main
from emoe.config import merge_settings
from emoe.config.base import Settings
from emoe.errors import UserError

GIVEN = {
    "analyze": ["--domains", "a=builtin", "--domains", "b=builtin"],
    "compare": ["~/none", "~/no"],
    "extend": ["--experts", "1"],
    "fetch": ["~/none"],
    "finetune": ["--task", "spam"],
    "frontier": ["--experts", "8"],
    "inspect": ["~/none"],
    "prune": ["--method", "random", "--keep", "0.5"],
    "push": ["--repo", "org/name"],
    "report": ["~/none", "--html", "~/page.html"],
    "sweep": ["~/none"],
}
"""Verb → what it takes beside --model and --output, or instead."""

WITHOUT_MODEL = ("models", "doctor", "pretrain")
VERBS = typer.main.get_command(app).commands


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.mark.parametrize("form", [["--model", "~/none"], ["--model=~/none"]], ids=["quoted", "behind ="])
@pytest.mark.parametrize("verb", [name for name in VERBS if name not in WITHOUT_MODEL])
def test_a_model_is_sought_in_the_home(verb, form, home, tmp_path, capsys):
    flags = {flag for parameter in VERBS[verb].params for flag in parameter.opts}
    given = [*(form if "--model" in flags else []), *GIVEN.get(verb, [])]
    given += ["--output", "~/out"] if "--output" in flags and verb not in ("compare", "eval") else []
    assert main([verb, *given]) == 2
    complaint = capsys.readouterr().err
    assert str(home / "none") in complaint
    assert "~" not in complaint
    assert list(tmp_path.iterdir()) == [home]


@pytest.mark.parametrize("kind", Settings.__subclasses__())
def test_settings_know_the_home(kind, home, tmp_path):
    """Given to a function, or in a file."""
    known = [key for key in ("model", "output") if key in kind.model_fields]
    (tmp_path / "file.yaml").write_text("".join(f"{key}: ~/there\n" for key in known))
    for settings in (
        merge_settings(kind, {key: Path("~/there") for key in known}),
        merge_settings(kind, {}, tmp_path / "file.yaml"),
    ):
        assert {getattr(settings, key) for key in known} == {str(home / "there")}


def test_functions_read_and_write_in_the_home(home, tmp_path, converted_llama):
    shutil.copytree(converted_llama, home / "model")
    emoe.prune("~/model", "~/pruned", method="random", keep=0.5)
    emoe.export("~/model", "~/dense", verify_tokens=0)
    assert {path.name for path in home.iterdir()} >= {"model", "pruned", "dense"}
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize("verb", ["convert", "prune"])
def test_a_user_that_there_is_none_of_has_no_home(verb, capsys):
    arguments = {"prune": GIVEN["prune"]}.get(verb, [])
    assert main([verb, "--model", "~nobody-of-this-name/x", "--output", "out", *arguments]) == 2
    assert "~nobody-of-this-name/x" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--text: .*~nobody-of-this-name/x.txt"):
        check_source("~nobody-of-this-name/x.txt", "--text")
