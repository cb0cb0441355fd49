"""Surgery on models with gates that were trained, and on tasks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from support.labelled import sentences, write_task

import emoe
from emoe.cli.main import main
from emoe.config import PruneConfig
from emoe.surgery.usage import text_of


def logits(folder) -> torch.Tensor:
    tokens = torch.randint(5, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits


def test_a_trained_gate_is_extended_pruned_and_taken_back(cosine, run, text):
    big = run("extend", cosine, "big", "--experts", 2)
    torch.testing.assert_close(logits(big), logits(cosine), rtol=0, atol=1e-5)
    back = run("prune", big, "back", "--remove", "last")
    assert torch.equal(logits(back), logits(cosine))


def test_a_trained_gate_without_some_experts(cosine, run, text):
    """Pruned, or never to be chosen: the same, weights of those that are chosen included."""
    small = run("prune", cosine, "small", *text, "--keep", 0.5, "--scope", "layer")
    kept = json.loads((small / "emoe_prune.json").read_text())["kept"]
    model = transformers.AutoModelForCausalLM.from_pretrained(cosine).eval()
    for layer, ffn in model.sparse_ffns().items():
        gone = torch.tensor([e for e in range(8) if e not in kept[f"{layer}.ffn"]])
        logits_of = ffn.router.logits
        ffn.router.logits = lambda x, f, old=logits_of, gone=gone: old(x, f).index_fill(1, gone, -torch.inf)
    tokens = torch.randint(5, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(logits(small), model(tokens).logits, rtol=0, atol=1e-5)


def test_a_task_is_counted_on(converted_llama, run, tmp_path):
    """On the texts that it trains on, each once, and on no other."""
    task = write_task(tmp_path / "task", train=400)
    with text_of(PruneConfig(task=str(task))) as (file,):
        texts = Path(file).read_text(encoding="utf-8")
    assert not Path(file).exists()
    train = sentences(400, 1)
    held_out = {text for text, _ in (*sentences(40, 2), *sentences(24, 3), *sentences(24, 4), *train[:3])}
    assert sorted(texts.split("\n\n")) == sorted({text for text, _ in train} - held_out)
    (tmp_path / "texts.txt").write_text(texts, encoding="utf-8")
    flags = ("--tokens", 2048, "--sequence-length", 64, "--keep", 0.5)
    by_task = run("prune", converted_llama, "by task", "--task", task, *flags)
    by_text = run("prune", converted_llama, "by text", "--text", tmp_path / "texts.txt", *flags)
    kept = [json.loads((folder / "emoe_prune.json").read_text())["kept"] for folder in (by_task, by_text)]
    assert kept[0] == kept[1]
    assert sum(map(len, kept[0].values())) == 16


@pytest.mark.parametrize(
    ("train", "model"),
    [("new-modules", "converted_llama"), ("router", "converted_llama"), ("new-modules", "bfloat16_llama")],
)
def test_finetuning_leaves_the_rest_bit_for_bit(train, model, request, run, tmp_path):
    big = run("extend", request.getfixturevalue(model), "big", "--experts", 2)
    flags = ("--model", big, "--task", write_task(tmp_path / "task"), "--output", tmp_path / "run", "--train", train)
    flags += ("--loss", "concentration=0.01", "--max-steps", 4, "--learning-rate", 1e-2, "--precision", "float32")
    assert main(["finetune", *map(str, flags), "--gate", "discriminant", "--quiet"]) == 0
    before = transformers.AutoModelForCausalLM.from_pretrained(big).state_dict()
    trained = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "seed-0" / "model")
    changed = set()
    for name, after in trained.state_dict().items():
        assert name not in before or after.dtype == before[name].dtype
        if name in before and not torch.equal(after, before[name]):
            changed.add(name.rpartition("layers.")[2].partition(".")[2])
            old = before[name]
            if train == "new-modules":
                kept = 48 if "proj" in name else 8
                part = (slice(None), slice(kept)) if "down_proj" in name else slice(kept)
                assert torch.equal(after[part], old[part])
    gates = {"mlp.router.weight", "mlp.router.bias"}
    record = json.loads((tmp_path / "run" / "seed-0" / "run.json").read_text())
    parts = [name for name in before if ("_proj" in name and ".mlp." in name) or name.endswith(tuple(gates))]
    if train == "new-modules":  # 2 experts of 10
        head = sum(weight.numel() for name, weight in trained.state_dict().items() if name not in before)
        assert record["trainable_parameters"] == head + sum(before[name].numel() // 5 for name in parts)
    assert gates <= changed if train == "new-modules" else changed == gates


def test_a_loss_needs_a_gate_of_its_own(tiny_llama, settings, run, tmp_path, capsys):
    """An average-key gate follows its neurons: the loss would act on nothing."""
    emoe.convert(str(tiny_llama), output=tmp_path / "key", **settings | {"gate": "average-key", "split": "weights"})
    big = run("extend", tmp_path / "key", "big", "--experts", 2)
    flags = ("--model", big, "--task", write_task(tmp_path / "task"), "--output", tmp_path / "run", "--max-steps", 2)
    assert main(["finetune", *map(str, flags), "--train", "new-modules", "--loss", "z=100", "--quiet"]) == 2
    assert "--loss: no gate of this model trains with --train new-modules" in capsys.readouterr().err


def test_gates_without_a_choice_do_not_train(converted_llama, tmp_path, capsys):
    """All experts on: nobody asks the gates."""
    flags = ["finetune", "--model", converted_llama, "--task", write_task(tmp_path / "task"), "--top-k", 8]
    flags += ["--gate", "discriminant", "--output", tmp_path / "run", "--quiet"]
    assert main([*map(str, flags), "--train", "router"]) == 2
    assert "--train: every token uses every expert" in capsys.readouterr().err
    assert main([*map(str, flags), "--overwrite", "--method", "emoe-learn", "--mi-weight", "0.1"]) == 2
    assert "--mi-weight: every token uses every expert" in capsys.readouterr().err


def test_gates_that_finetuning_puts_in_train_alone(converted_llama, tmp_path):
    """The model's own gates are tables, those of this arm train already."""
    flags = ["finetune", "--model", converted_llama, "--task", write_task(tmp_path / "task"), "--method", "emoe-learn"]
    flags += ["--output", tmp_path / "run", "--train", "router", "--max-steps", 2, "--precision", "float32", "--quiet"]
    assert main([*map(str, flags)]) == 0
    assert json.loads((tmp_path / "run" / "seed-0" / "run.json").read_text())["gate"] == "cosine"


def test_copies_are_refused(converted_llama, tmp_path, capsys):
    folder = Path(shutil.copytree(converted_llama, tmp_path / "copies"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"emoe_copies": 4}))
    assert main(["extend", "--model", str(folder), "--output", str(tmp_path / "x"), "--experts", "1"]) == 2
    assert "copies of a whole FFN (gmoe)" in capsys.readouterr().err
