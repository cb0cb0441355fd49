"""Weights that are not what was written, or no numbers, are not made to look sound by surgery."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.modules import moduleformer

import emoe
from emoe.checkpoint.digests import write_digests
from emoe.cli.main import main
from emoe.surgery import history
from emoe.surgery.modules import anatomy_of
from emoe.surgery.usage import load_model


@pytest.fixture(params=["converted_llama", "tiny_moduleformer"])
def copy(request, tmp_path) -> Path:
    """A model that may be damaged, with the record of its weights."""
    folder = Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "copy"))
    write_digests(folder)
    return folder


@pytest.fixture
def refused(copy, text_file, tmp_path, capsys):
    """``refused("prune", *flags)`` → the one line of a verb on the copy."""

    def call(verb: str, *flags) -> str:
        given = [verb, "--model", copy, "--output", tmp_path / "out", *flags, "--sequence-length", 64, "--tokens", 1024]
        assert main([*map(str, given)]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    return call


def flip(folder: Path) -> None:
    path = next(folder.glob("model*.safetensors"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def spoil(folder: Path, layer: int) -> None:
    """Put a NaN into the output matrix of a layer's FFN, as if that had been written."""
    for path in folder.glob("model*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if f".{layer}." in name and name.endswith(("down_proj.weight", "mlpf.output_experts.weight")):
                tensors[name].view(-1)[0] = torch.nan
        save_file(tensors, path, metadata={"format": "pt"})
    write_digests(folder)


def test_a_flipped_byte(copy, refused, text_file, capsys):
    assert main(["inspect", str(copy), "--verify"]) == 0
    assert "are as they were written" in capsys.readouterr().out
    flip(copy)
    assert main(["inspect", str(copy), "--verify"]) == 2
    capsys.readouterr()
    for verb, *flags in (
        ("prune", "--text", text_file, "--keep", 1.0),
        ("prune", "--method", "layers-top", "--keep", 0.5),
        ("analyze", "--domains", f"a={text_file}"),
    ):
        assert "is not what was written" in refused(verb, *flags)
    assert "is not what was written" in refused("extend", "--experts", 1)


@pytest.mark.parametrize("layer", [0, 2])
def test_what_is_no_number(layer, copy, refused, text_file, tmp_path, capsys):
    """Behind the last layers no gate looks: the loss or the weights tell."""
    spoil(copy, layer)
    backwards = tmp_path / "backwards.txt"
    backwards.write_text(text_file.read_text()[::-1])
    complaints = ("gets NaN or infinite numbers", "holds NaN or infinite values")
    for verb, *flags in (
        ("prune", "--text", text_file, "--keep", 0.5),
        ("prune", "--text", text_file, "--keep", 0.5, "--count", "hard"),
        ("prune", "--method", "random", "--keep", 0.5),
        ("analyze", "--domains", f"a={text_file}"),
        ("extend", "--experts", 1),
        ("extend", "--experts", 1, "--text", text_file, "--old-text", backwards),
    ):
        line = refused(verb, *flags)
        assert any(complaint in line for complaint in complaints), line


def test_weights_are_hashed_once(converted_llama, run, monkeypatch):
    read = []
    monkeypatch.setattr(history, "sha256_file", lambda path: read.append(path.name) or "0" * 64)
    run("extend", converted_llama, "big", "--experts", 1)
    assert read == ["config.json"]


@pytest.mark.parametrize(
    ("gate", "table"), [("representative", "scale"), ("discriminant", "bias"), ("discriminant", "bounds")]
)
def test_a_gate_without_its_table(gate, table, tiny_llama, settings, run, tmp_path, capsys):
    folder = tmp_path / "moe"
    emoe.convert(str(tiny_llama), output=folder, **settings | {"gate": gate, "routing": "threshold"})
    for path in folder.glob("model*.safetensors"):
        tensors = load_file(path)
        save_file({n: t for n, t in tensors.items() if not n.endswith(f"router.{table}")}, path, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    facts = json.loads(index.read_text())
    facts["weight_map"] = {n: f for n, f in facts["weight_map"].items() if not n.endswith(f"router.{table}")}
    index.write_text(json.dumps(facts))
    write_digests(folder)
    for flags in (["extend", "--experts", "1"], ["prune", "--method", "random", "--keep", "0.5"]):
        assert main([*flags, "--model", str(folder), "--output", str(tmp_path / "out")]) == 2
        assert f"lacks tensor model.layers.0.mlp.router.{table}, which the {gate} gate" in capsys.readouterr().err


@pytest.mark.parametrize("gate", ["mlp", "linear", "gmm"])
@pytest.mark.parametrize("extended", [False, True])
def test_without_a_layers_only_module(gate, extended, run, text, text_file, tmp_path):
    """It gives nothing then: what else the layer does is as it was."""
    small = run("prune", moduleformer(tmp_path / "model", gate), "small", *text, "--keep", 0.05)
    if extended:
        small = run("extend", small, "big", "--experts", 1, "--attention", 1)
    model, tokens = load_model(small, head=True), torch.arange(5, 37)[None]
    for name in ("1.ffn", "1.attention"):
        pool = anatomy_of(small)._pools(model)[name]
        kept = pool.output_experts.weight.data.clone()
        with torch.no_grad(), anatomy_of(small).without(model, name, 0):
            found = model(tokens).logits
        pool.output_experts.weight.data[0] = 0
        with torch.no_grad():
            torch.testing.assert_close(found, model(tokens).logits, rtol=0, atol=1e-5)
        pool.output_experts.weight.data.copy_(kept)
    flags = ("--knock-out-tokens", 64, "--knock-out", 6)
    report = run("analyze", small, "usage", "--domains", f"a={text_file}", *text[2:], *flags) / "usage.json"

    def never(constant: str) -> None:
        raise AssertionError(constant)

    changes = json.loads(report.read_text(), parse_constant=never)["knock_out"]
    assert len(changes) == 6
