"""Help, and refusals that need no model, come before torch and transformers, whose import takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import typer

from emoe.cli.main import app

HELP = [[name, "--help"] for name in ("", *typer.main.get_command(app).commands)]
NOWHERE, OUT = "/nowhere/model", ("--output", "/nowhere/out")
NO_MODEL = {
    "convert": ["--experts", "8", *OUT],
    "estimate": [],
    "frontier": ["--experts", "8", *OUT],
    "recover": OUT,
    "tune": OUT,
    "analyze": ["a=builtin", *OUT],
    "prune": ["--keep", "0.5", "--method", "random", *OUT],
    "extend": ["--experts", "1", *OUT],
    "export": OUT,
    "push": ["--repo", "me/model"],
    "finetune": ["--task", "spam", *OUT],
    "eval": [],
}
"""Verbs with ``--model``, and what else they need."""
SAID = {
    **dict.fromkeys(NO_MODEL, f"--model: {NOWHERE}"),
    "recover": f"--model: {NOWHERE} is not a folder; give the folder of a converted checkpoint",
    "tune": f"--model: {NOWHERE} is not a folder; give the folder of a causal language model",
    "prune": f"--model: {NOWHERE} is not a folder; give the folder of a checkpoint with experts",
}
OTHERS = [
    (["inspect", NOWHERE], "is not a folder"),
    (["report", NOWHERE, "--html", "r.html"], "is not a folder"),
    (["report", ".", "--html", "."], "--html: . is a folder"),
    (["compare", NOWHERE], "is not a folder"),
    (["compare", NOWHERE, "--output", "/nowhere/c.md"], "--output: /nowhere is not a folder"),
    (["sweep", NOWHERE], "does not exist"),
    (["fetch", NOWHERE], "does not exist"),
    (["pretrain"], "--output: missing"),
    (["frontier", "--model", "smollm2-135m", "--experts", "0", *OUT], "--experts: must be at least 1"),
    (["frontier", "--model", "smollm2-135m", "--active", "half", *OUT], "--active: 'half' is not a list of numbers"),
    (["finetune", "--task", "spam", "--method", "moe", *OUT], "unknown method 'moe'"),
    (["finetune", "--task", "spm", *OUT], "--task: unknown task 'spm'"),
    (["prune", "--model", ".", *OUT], "--keep: give exactly one"),
    (["extend", "--model", ".", *OUT], "--experts: nothing to add"),
    (["export", "--model", ".", *OUT, "--to", "onnx"], "--to: unknown format 'onnx'"),
    (["export", "--model", ".", *OUT, "--dtype", "float8"], "--dtype: unknown element type 'float8'"),
]
REFUSED = [([verb, "--model", NOWHERE, *more], SAID[verb]) for verb, more in NO_MODEL.items()]
REFUSED += [([verb, *more], "--model") for verb, more in NO_MODEL.items()] + OTHERS

PROGRAM = """
import contextlib, io, json, sys
from emoe.cli.main import main
for arguments in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        status = main(arguments)
    slow = [name for name in ("torch", "transformers", "sklearn") if name in sys.modules]
    print(json.dumps([arguments, status, said.getvalue(), slow]))
    assert not slow, arguments
"""


def answers(calls: list[list[str]]) -> list[list]:
    """[arguments, status, standard error, slow modules imported] of each call, all in one process."""
    given = json.dumps(calls)
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=given, capture_output=True, text=True)
    assert done.returncode == 0, [*done.stdout.splitlines()[-1:], done.stderr]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_help():
    assert [status for _, status, _, _ in answers([[w for w in words if w] for words in HELP])] == [0] * len(HELP)


def test_refusals():
    for (_, complaint), (arguments, status, said, _) in zip(REFUSED, answers([c for c, _ in REFUSED]), strict=True):
        assert status == 2, arguments
        assert complaint in said, arguments
        assert len(said.strip().splitlines()) == 1, said


@pytest.mark.parametrize("name", ["transformers", "huggingface_hub"])
def test_libraries_are_silent_when_they_come(name):
    """Though they are not there yet when they are silenced."""
    program = f"""
from emoe.cli.progress import silence_libraries
silence_libraries()
import {name}.utils.logging
print({name}.utils.logging.get_verbosity())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "40", done.stderr  # logging.ERROR
