"""Added modules whose gates were fitted: open on the text they are for, shut on the other, and nothing else changes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from support.modules import moduleformer
from support.routing import FIXED

import emoe
from emoe.cli.main import main
from emoe.surgery.extend import notes_on
from emoe.surgery.modules import anatomy_of
from emoe.surgery.usage import load_model, read_blocks

WORDS = {
    "new": "zuerst wurde gesagt dass niemand etwas davon wisse",
    "old": "it is the first that they ever heard of it",
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Path]:
    """Two languages, in random order of words."""
    folder, found = tmp_path_factory.mktemp("texts"), {}
    for name, words in WORDS.items():
        drawn = random.Random(0).choices(words.split(), k=6000)
        found[name] = folder / f"{name}.txt"
        found[name].write_text(" ".join(drawn), encoding="utf-8")
    return found


@pytest.fixture
def flags(texts) -> tuple:
    return (
        "--experts",
        2,
        "--text",
        texts["new"],
        "--old-text",
        texts["old"],
        "--tokens",
        2048,
        "--sequence-length",
        64,
    )


@pytest.fixture(scope="module")
def softmax_llama(tiny_llama, settings, text_file, tmp_path_factory) -> Path:
    """A converted model with softmax gates, hardly trained."""
    folder = tmp_path_factory.mktemp("softmax")
    emoe.convert(str(tiny_llama), output=folder / "converted", **settings | FIXED)
    few = {"steps": 1, "tokens_per_step": 64, "sequence_length": 64, "held_out_tokens": 64, "precision": "float32"}
    emoe.recover(folder / "converted", folder / "out", text=[str(text_file)], gates="softmax", **few)
    return folder / "out"


@pytest.fixture(params=["discriminant", "softmax", "mlp", "linear", "gmm"])
def model(request, converted_llama, tmp_path_factory) -> Path:
    """Converted models, and ModuleFormers of every gate."""
    if request.param == "discriminant":
        return converted_llama
    if request.param == "softmax":
        return request.getfixturevalue("softmax_llama")
    return moduleformer(tmp_path_factory.mktemp("moduleformer") / "model", request.param)


def opened(folder: Path, text: Path) -> dict[str, float]:
    """Share of the tokens that use a set's added modules, by name of the set, at the model's own work."""
    anatomy, found = anatomy_of(folder), {}
    added = {known.name: known.groups[0] for known in anatomy.sets() if len(known.groups) > 1 and known.groups[1]}
    blocks_BT = read_blocks(folder, [str(text)], length=64, tokens=2048, seed=1, flag="--text")

    def see(name, seen) -> None:
        if name in added:
            found[name] = seen.mask()[:, added[name] :].mean().item()

    model = load_model(folder, head=False)
    with torch.no_grad(), anatomy.watch(model, see, energies=False):
        model(blocks_BT)
    return found


def logits(folder: Path) -> torch.Tensor:
    tokens = torch.randint(5, 96, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits


def test_gates_open_on_the_new_text_alone(model, texts, flags, run):
    big = run("extend", model, "big", *flags)
    torch.testing.assert_close(logits(big), logits(model), rtol=0, atol=1e-5)
    report = json.loads((big / "emoe_extend.json").read_text())
    new, old = opened(big, texts["new"]), opened(big, texts["old"])
    assert new.keys() == report["gates"].keys()
    for name, told in report["gates"].items():
        assert told["old"] <= 0.1
        assert new[name] == pytest.approx(told["new"], abs=0.15)  # other passages
        assert old[name] == pytest.approx(told["old"], abs=0.1)
    assert sum(new.values()) > 2 * sum(old.values())
    shares = [100 * sum(told[kind] for told in report["gates"].values()) / len(new) for kind in ("new", "old")]
    said = "gates open on {:.0f}% of the new text's tokens and {:.0f}% of the old text's (mean)".format(*shares)
    assert report["notes"] == [said]
    step = json.loads((big / "config.json").read_text())["emoe_provenance"]["history"][-1]
    repeats = {"added": {"ffn": 2}, "seed": 0, "old_share": 0.1, "tokens": 2048, "sequence_length": 64}
    assert step | repeats | {"text": [texts["new"].name], "old_text": [texts["old"].name]} == step
    places = {"text": [str(texts["new"])], "old_text": [str(texts["old"])]}  # the history goes wherever the model goes
    assert report["settings"] | places == report["settings"]
    back = run("prune", big, "back", "--remove", "last")
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("kind", ["mlp", "linear", "gmm"])
def test_a_small_share_of_the_old_text_is_kept_to(kind, texts, flags, run, tmp_path):
    """Gates without an intercept: `--old-share` holds in every layer, or a note names the layer."""
    big = run("extend", moduleformer(tmp_path / "model", kind), "big", *flags, "--attention", 1, "--old-share", 0.02)
    report = json.loads((big / "emoe_extend.json").read_text())
    told = " ".join(report["notes"])
    for name, gate in report["gates"].items():
        assert gate["new"] > 3 * gate["old"]
        assert gate["old"] <= 0.02 or f"{name}: no gate" in told


def test_texts_that_are_alike_are_refused(model, texts, flags, tmp_path, capsys):
    """Gates that open on neither would give experts that nothing ever trains."""
    same = map(str, (*flags[:2], "--text", texts["old"], *flags[4:]))
    assert main(["extend", "--model", str(model), "--output", str(tmp_path / "out"), *same]) == 2
    assert "--old-text: no gate tells it from --text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("new", "old", "told"),
    [
        (0.5, 0.1, []),
        (0.4, 0.25, ["2.ffn: no gate of this kind keeps to --old-share 0.1; it opens on 40.0%"]),
        (0.1, 0.1, ["2.ffn: its gate does not tell the texts apart; it opens on 10.0%"]),
    ],
)
def test_notes_name_the_layers(new, old, told):
    found = notes_on({"2.ffn": (torch.zeros(3), new, old)}, 0.1)[1:]
    assert [note.split(" of the new")[0] for note in found] == told


def test_new_experts_learn_and_their_gates_stay(model, texts, flags, run):
    big = run("extend", model, "big", *flags)
    steps = ("--steps", 3, "--tokens-per-step", 128, "--sequence-length", 32, "--held-out-tokens", 64)
    tuned = run("tune", big, "tuned", "--text", texts["new"], *steps, "--train", "new-experts", "--learning-rate", 1e-2)
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (big, tuned))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not [name for name in changed if "router" in name or "gate." in name]
    back = run("prune", tuned, "back", "--remove", "last")
    whole, left = (transformers.AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (model, back))
    assert whole.keys() == left.keys()
    assert [name for name in whole if not torch.equal(whole[name], left[name])] == []


@pytest.mark.parametrize(
    ("left_out", "complaint"),
    [("--old-text", "--old-text: missing; gates are fitted on"), ("--text", "--text: missing; gates are fitted on")],
)
def test_one_text_is_not_enough(left_out, complaint, converted_llama, flags, tmp_path, capsys):
    place = flags.index(left_out)
    given = [*flags[:place], *flags[place + 2 :]]
    assert main(["extend", "--model", str(converted_llama), "--output", str(tmp_path / "b"), *map(str, given)]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_one_block_is_not_enough(converted_llama, flags, tmp_path, capsys):
    given = ["extend", "--model", str(converted_llama), "--output", str(tmp_path / "b"), *map(str, flags)]
    assert main([*given, "--tokens", "64"]) == 2
    assert "--tokens: 64 is one block; give at least 128" in capsys.readouterr().err


def test_a_gate_that_follows_its_neurons_is_not_fitted(tiny_llama, settings, flags, tmp_path, capsys):
    emoe.convert(str(tiny_llama), output=tmp_path / "key", **settings | {"gate": "average-key", "split": "weights"})
    given = ["extend", "--model", str(tmp_path / "key"), "--output", str(tmp_path / "b"), *map(str, flags)]
    assert main(given) == 2
    assert "--text: the average-key gate of this model follows its neurons" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_dense_export_does_not_drop_gates_in_silence(converted_llama, texts, flags, run, tmp_path, capsys):
    """Added experts that have learnt something are on for every token there: another model."""
    big = run("extend", converted_llama, "big", *flags)
    training = ("--steps", 10, "--tokens-per-step", 256, "--sequence-length", 64, "--held-out-tokens", 128)
    learnt = run(
        "tune", big, "learnt", "--text", texts["new"], "--train", "new-experts", "--learning-rate", 0.1, *training
    )
    export = ["export", "--model", str(learnt), "--output", str(tmp_path / "dense")]
    read = ["--verify-text", str(texts["old"]), "--verify-tokens", "256"]
    for given in (read, ["--verify-tokens", "0"]):
        assert main([*export, *given]) == 2
        assert "`emoe prune --remove added`" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "dense").exists()
    assert main([*export, *read, "--approximate"]) == 0
    report = json.loads((tmp_path / "dense" / "emoe_export.json").read_text())
    assert report["comparisons"][0]["kl"] > 1e-6
    assert report["exactness"].endswith("added experts are on for every token")
