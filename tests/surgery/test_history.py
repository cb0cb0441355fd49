"""What a checkpoint says that it was made from is what was there."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from emoe.checkpoint.digests import write_digests
from emoe.cli.main import main
from emoe.report.history import history_line
from emoe.surgery.history import digest_of


def by_hand(folder: Path) -> str:
    """sha256 over the names and sha256 of config.json and the weight files."""
    files = [folder / "config.json", *sorted(folder.glob("model*.safetensors"))]
    lines = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def history_of(folder: Path) -> list[dict]:
    return json.loads((folder / "config.json").read_text())["emoe_provenance"]["history"]


def flip(file: Path) -> None:
    """The lowest bit of the last byte: of a weight."""
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("model", ["converted_llama", "tiny_moduleformer"])
def test_a_byte_of_any_weight_file_changes_the_digest(model, request, tmp_path):
    folder = Path(shutil.copytree(request.getfixturevalue(model), tmp_path / "model"))
    digest, weights = digest_of(folder), sorted(folder.glob("model*.safetensors"))
    assert digest == by_hand(folder)
    assert weights
    for file in weights:
        flip(file)
        assert digest_of(folder) != digest
        flip(file)
        assert digest_of(folder) == digest
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config + " ")
    assert digest_of(folder) != digest


def test_each_step_names_what_it_began_with(converted_llama, run, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    big = run("extend", converted_llama, "big", "--experts", 1)
    flip(sorted(big.glob("model*.safetensors"))[-1])
    write_digests(big)
    back = run("prune", big, "back", "--remove", "last")
    assert [step["from_digest"] for step in history_of(back)] == [by_hand(converted_llama), by_hand(big)]
    assert [step["when"] for step in history_of(back)] == ["1970-01-02T00:00:00+00:00"] * 2


WHEN = {"when": "1970-01-02T00:00:00+00:00", "from_digest": "0123456789abcdef0123"}


@pytest.mark.parametrize(
    ("step", "told"),
    [
        ({"verb": "extend", "added": {"ffn": 2}}, "extend; 2 ffn experts a layer"),
        (
            {"verb": "extend", "added": {"ffn": 2}, "text": ["a.txt", "corpus:german"], "old_text": ["b.txt"]},
            "extend; 2 ffn experts a layer; gates fitted on a.txt and corpus:german against b.txt",
        ),
        (
            {"verb": "prune", "settings": {"text": ["a.txt", "b.txt"], "keep": 0.5, "scope": "layer", "floor": 1}},
            "prune; text a.txt and b.txt, keep 0.5, scope layer",
        ),
        (
            {"verb": "tune", "settings": {"text": ["a.txt"], "train": "all", "loss": ["mi=1", "router=2"]}, "steps": 3},
            "tune; text a.txt, train all, loss mi=1 and router=2; 3 steps",
        ),
        ({"verb": "prune", "settings": {"task": "spam", "text": [], "keep": 0.5}}, "prune; task spam, keep 0.5"),
    ],
)
def test_a_line_says_on_which_text_and_has_no_python_in_it(step, told):
    assert history_line({**step, **WHEN}) == f"{told}; 1970-01-02T00:00:00+00:00, from 0123456789abcdef"


def test_inspect_shows_the_texts(tiny_moduleformer, run, text, text_file, capsys):
    small = run("prune", tiny_moduleformer, "small", *text, "--keep", 0.5)
    assert main(["inspect", str(small)]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"prune; method use, text {text_file.name}, keep 0.5" in shown
