"""Surgery on models with gates that were trained, and on tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import emoe
from emoe.cli.main import main

ROWS = "text,label\n" + "".join(f"the neurons fire together {i},{i % 2}\n" for i in range(400))


@pytest.fixture
def cosine(tiny_llama, settings, tmp_path) -> Path:
    """A converted model with cosine gates, which conversion does not make: drawn at random."""
    folder = tmp_path / "cosine"
    emoe.convert(str(tiny_llama), output=folder, **settings | {"gate": "average-key", "split": "weights"})
    config = transformers.AutoConfig.from_pretrained(folder)
    config.emoe_gate = "cosine"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config)
    for ffn in model.sparse_ffns().values():
        ffn.router.cosine.centroids.weight.data.normal_()
    model.save_pretrained(tmp_path / "saved")
    for file in folder.iterdir():
        if not (tmp_path / "saved" / file.name).exists() and "safetensors" not in file.name:
            shutil.copyfile(file, tmp_path / "saved" / file.name)
    return tmp_path / "saved"


def logits(folder) -> torch.Tensor:
    tokens = torch.randint(5, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits


def test_a_trained_gate_is_extended_pruned_and_taken_back(cosine, run, text):
    big = run("extend", cosine, "big", "--experts", 2)
    torch.testing.assert_close(logits(big), logits(cosine), rtol=0, atol=1e-5)
    back = run("prune", big, "back", "--remove", "last")
    assert torch.equal(logits(back), logits(cosine))
    small = run("prune", cosine, "small", *text, "--keep", 0.5, "--scope", "layer")
    assert torch.isfinite(logits(small)).all()


def test_a_task_is_counted_on(converted_llama, run, tmp_path):
    (tmp_path / "rows.csv").write_text(ROWS)
    (tmp_path / "task.yaml").write_text(
        "name: own\nlabels: [zero, one]\ndomains: {here: {role: id, file: rows.csv, classes: {0: zero, 1: one}}}\n"
    )
    flags = ("--tokens", 2048, "--sequence-length", 64, "--keep", 0.5, "--scope", "layer")
    by_task = run("prune", converted_llama, "by task", "--task", tmp_path / "task.yaml", *flags)
    assert json.loads((by_task / "emoe_prune.json").read_text())["modules"] == {"before": 32, "after": 16}


def test_copies_are_refused(converted_llama, tmp_path, capsys):
    folder = Path(shutil.copytree(converted_llama, tmp_path / "copies"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"emoe_copies": 4}))
    assert main(["extend", "--model", str(folder), "--output", str(tmp_path / "x"), "--experts", "1"]) == 2
    assert "copies of a whole FFN (gmoe)" in capsys.readouterr().err
