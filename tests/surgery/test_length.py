"""Blocks of text are no longer than the model has positions, of which RoBERTa keeps two for itself."""

from __future__ import annotations

import json

import pytest
from support.tiny import tiny_checkpoint

import emoe

NOTE = "--sequence-length lowered from 512 to the model's 130"


@pytest.fixture(scope="module")
def roberta(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("roberta")
    dense = tiny_checkpoint(folder / "dense", "roberta")
    emoe.convert(str(dense), output=folder / "moe", **settings)
    return folder / "moe"


@pytest.mark.parametrize("method", ["use", "magnitude"])
def test_pruning(method, roberta, run, text_file):
    folder = run("prune", roberta, "small", "--text", text_file, "--tokens", 2048, "--keep", 0.5, "--method", method)
    assert NOTE in json.loads((folder / "emoe_prune.json").read_text())["notes"]


def test_extending(roberta, run, text_file, tmp_path):
    (tmp_path / "old.txt").write_text(text_file.read_text()[::-1])
    texts = ("--text", text_file, "--old-text", tmp_path / "old.txt", "--tokens", 2048, "--sequence-length", 512)
    folder = run("extend", roberta, "big", "--experts", 1, *texts)
    assert NOTE in json.loads((folder / "emoe_extend.json").read_text())["notes"]


def test_analysing(roberta, run, text_file):
    folder = run("analyze", roberta, "usage", "--domains", f"text={text_file}", "--tokens", 2048)
    assert NOTE in json.loads((folder / "usage.json").read_text())["notes"]
