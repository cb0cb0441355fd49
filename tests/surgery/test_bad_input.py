"""What cannot be done is refused in one line that names the flag, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.tiny import tiny_checkpoint

import emoe.calibration.text
import emoe.runtime
import emoe.surgery.baselines
import emoe.surgery.extend
import emoe.surgery.prune
import emoe.surgery.usage
from emoe.cli.main import main


@pytest.fixture
def refused(capsys, tmp_path):
    def run(verb: str, model, *flags) -> str:
        output = tmp_path / "out"
        assert main([verb, "--model", str(model), "--output", str(output), *map(str, flags)]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("emoe: ")]
        assert len(lines) == 1
        assert not output.exists()
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--keep", 0], "--keep: must be above 0"),
        (["--keep", 1.5], "--keep: must be at most 1, got 1.5"),
        ([], "--keep: give exactly one of --keep, --threshold and --remove"),
        (["--keep", 0.5, "--threshold", 0.1], "--keep: give exactly one of"),
        (["--threshold", 1.5], "--threshold: 1.5 removes all; the most used module has 1"),
        (["--keep", 0.5, "--floor", 99], "experts, fewer than 99"),
        (["--threshold", 1, "--floor", 0, "--normalise", "sum"], "--threshold: 1.0 removes all"),
        (["--keep", 0.25, "--scope", "layer", "--top-k", 3], "--top-k: 3 is more than the 2 experts that remain"),
        (["--remove", "last"], "--remove: nothing was ever added to this model"),
        (["--keep", 0.5, "--method", "layer"], "--method"),
        (["--remove", "last", "--method", "layers-top"], "--method: --remove takes back what was added"),
        (["--task", "spam", "--keep", 0.5], "--task: use is counted on --text or on a task's texts"),
        (["--keep", 0.5, "--method", "magnitude", "--top-k", 2], "--top-k: --method magnitude writes a dense model"),
        (["--threshold", 0.5, "--method", "random"], "--threshold: --method random counts nothing; give --keep"),
    ],
)
def test_prune(flags, complaint, refused, converted_llama, text):
    counted = () if {"--remove", "random"} & set(flags) else text
    assert complaint in refused("prune", converted_llama, *counted, *flags)


def test_an_unknown_task(refused, converted_llama, monkeypatch):
    monkeypatch.setattr(emoe.surgery.prune, "check_digests", None)
    assert "--task: " in refused("prune", converted_llama, "--task", "no-such-task", "--keep", 0.5)


@pytest.mark.parametrize("verb", ["prune", "extend", "tune", "recover", "analyze"])
@pytest.mark.parametrize("seed", [2**32, 10**20])
def test_seeds_that_no_generator_takes(verb, seed, refused, converted_llama):
    assert f"--seed: must be below 4294967296, got {seed}" in refused(verb, converted_llama, "--seed", seed)


@pytest.mark.parametrize("flag", ["--experts", "--attention"])
def test_more_experts_than_any_model_has(flag, refused, tiny_moduleformer):
    line = refused("extend", tiny_moduleformer, flag, 10**12)
    assert f"{flag}: 1000000000000 is more than any model has; at most 1048576" in line


def test_no_room_is_seen_before_weights_are_read(refused, converted_llama, text, monkeypatch):
    monkeypatch.setattr(emoe.surgery.extend, "check_digests", None)
    monkeypatch.setattr(emoe.runtime, "free_bytes", lambda folder: 1 << 30)
    gates = (*text, "--old-text", "builtin")
    line = refused("extend", converted_llama, "--experts", 10**6, *gates)
    assert "--output: " in line
    assert "needs 9.1 GiB but its disk has 1.0 GiB free" in line


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_what_will_be_written_is_said(quiet, converted_llama, tmp_path, capsys):
    flags = ["extend", "--model", str(converted_llama), "--output", str(tmp_path / "big"), "--experts", "8", *quiet]
    assert main(flags) == 0
    size = sum(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors")) / 1024
    found = re.findall(r"disk: ([\d.]+) KiB needed in", capsys.readouterr().err)
    assert [float(kib) for kib in found] == ([] if quiet else [pytest.approx(size, rel=0.05)])


@pytest.mark.parametrize("verb", ["prune", "extend", "tune", "recover"])
@pytest.mark.parametrize("epoch", ["yesterday", "9" * 30])
def test_a_clock_that_cannot_be_read(verb, epoch, refused, converted_llama, text, monkeypatch):
    """Told before anything is counted or trained."""
    for module in (emoe.surgery.prune, emoe.surgery.usage):
        monkeypatch.setattr(module, "read_blocks", None)
    monkeypatch.setattr(emoe.calibration.text, "read_blocks", None)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    flags = {"prune": [*text, "--keep", 0.5], "extend": ["--experts", 1]}.get(verb, text[:2])
    assert f"SOURCE_DATE_EPOCH: '{epoch}' is no time in seconds" in refused(verb, converted_llama, *flags)


@pytest.fixture(scope="module")
def average_key(tiny_llama, settings, tmp_path_factory):
    """Converted, with a gate that follows the weights."""
    output = tmp_path_factory.mktemp("key") / "model"
    emoe.convert(str(tiny_llama), output=output, **settings | {"gate": "average-key", "split": "weights"})
    return output


@pytest.mark.parametrize(
    ("verb", "model", "flags", "complaint"),
    [
        ("prune", "converted_llama", ["--threshold", 1, "--method", "magnitude"], "--threshold: --method magnitude"),
        ("prune", "converted_llama", ["--keep", 1, "--method", "magnitude", "--top-k", 2], "--top-k: --method magn"),
        ("prune", "converted_llama", ["--remove", "last"], "--remove: nothing was ever added"),
        ("prune", "tiny_moduleformer", ["--keep", 0.5, "--method", "magnitude"], "--method: magnitude works on"),
        ("prune", "tiny_moduleformer", ["--keep", 0.5, "--count", "energy"], "--count: attention experts have no"),
        ("extend", "tiny_moduleformer", ["--experts", 1], "--old-text: missing"),
        ("extend", "average_key", ["--experts", 1, "--old-text", "builtin"], "--text: the average-key gate"),
        ("tune", "converted_llama", ["--train", "new-modules"], "--train: this model has no new modules"),
        ("tune", "converted_llama", ["--train", "lora", "--loss", "router=1"], "--loss: router acts on"),
        ("tune", "converted_llama", ["--top-k", 9], "--top-k: 9 must lie between 1 and the model's 8 experts"),
        ("tune", "tiny_moduleformer", ["--top-k", 1], "--top-k: only converted models have a budget"),
        ("analyze", "tiny_moduleformer", ["--top-k", 1], "--top-k: only converted models have a budget"),
        ("recover", "average_key", ["--gates", "learned"], "--gates: the average-key gate of this model has no table"),
        ("recover", "cosine", ["--gates", "learned"], "--gates: the cosine gate of this model has no table"),
    ],
)
def test_what_does_not_fit_is_seen_before_weights_are_read(
    verb, model, flags, complaint, refused, text_file, request, monkeypatch
):
    for module in ("emoe.surgery.prune", "emoe.surgery.extend", "emoe.analysis.analyze", "emoe.finetuning.loop"):
        monkeypatch.setattr(f"{module}.check_digests", None)
    text = ["--domains", f"a={text_file}"] if verb == "analyze" else ["--text", text_file]
    given = flags if "--remove" in flags else [*text, *flags]
    assert complaint in refused(verb, request.getfixturevalue(model), *given)


@pytest.mark.parametrize("method", ["use", "magnitude"])
def test_an_output_in_the_way_is_seen_before_counting(method, converted_llama, text, tmp_path, capsys, monkeypatch):
    def reached(*arguments, **keywords):
        raise AssertionError("counting has begun")

    for module in (emoe.surgery.prune, emoe.surgery.baselines):
        monkeypatch.setattr(module, "read_blocks", reached)
    flags = ["prune", "--model", converted_llama, *text, "--keep", 0.5, "--method", method]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert main([*map(str, flags), "--output", str(tmp_path / "out")]) == 2
    assert "exists; choose another folder" in capsys.readouterr().err
    assert main([*map(str, flags)]) == 2
    assert "--output: missing" in capsys.readouterr().err


def test_a_layer_left_without_experts(refused, converted_llama, text, run):
    line = refused("prune", converted_llama, *text, "--keep", 0.04, "--floor", 0)
    assert "is left without ffn experts; give --floor 1" in line
    few = run("prune", converted_llama, "few", *text, "--keep", 0.04)
    assert json.loads((few / "config.json").read_text())["emoe_groups"] == [[1]] * 4
    notes = json.loads((few / "emoe_prune.json").read_text())["notes"]
    assert "3 more stay than --keep 0.04 alone keeps: --floor 1 of each layer" in notes


def test_k_is_clipped_and_reported(converted_llama, text, run, capsys):
    folder = run("prune", converted_llama, "small", *text, "--keep", 0.25, "--scope", "layer")
    report = json.loads((folder / "emoe_prune.json").read_text())
    assert report["notes"] == ["num_experts_per_tok clipped from 3 to 2: no layer has more ffn experts left"]
    assert json.loads((folder / "config.json").read_text())["num_experts_per_tok"] == 2


def test_too_little_text(refused, converted_llama, tmp_path):
    (tmp_path / "short.txt").write_text("few words")
    line = refused("prune", converted_llama, "--text", tmp_path / "short.txt", "--keep", 0.5)
    assert "--text: " in line
    assert "is empty or shorter than one block" in line


def test_models_without_experts(refused, tiny_llama, text, tiny_moduleformer, converted_llama):
    assert "has no experts (model_type 'llama'); convert it first" in refused("prune", tiny_llama, *text, "--keep", 0.5)
    assert "has no experts" in refused("extend", tiny_llama, "--experts", 1)
    assert "--attention: this model has no attention experts" in refused("extend", converted_llama, "--attention", 1)
    assert "--experts: nothing to add" in refused("extend", converted_llama)
    assert "--text: missing" in refused("prune", tiny_moduleformer, "--keep", 0.5)


@pytest.mark.parametrize(
    ("verb", "flags", "complaint"),
    [
        ("export", [], "is a ModuleFormer, born with experts; this is for converted checkpoints"),
        ("recover", [], "is a ModuleFormer, born with experts; this is for converted checkpoints"),
        ("tune", ["--top-k", 2, "--sequence-length", 64], "--top-k: only converted models have a budget"),
        ("prune", ["--method", "magnitude", "--keep", 0.5], "--method: magnitude works on converted models only"),
        ("prune", ["--count", "energy", "--keep", 0.5], "--count: attention experts have no energy of their own"),
    ],
)
def test_what_is_not_for_a_moduleformer(verb, flags, complaint, refused, tiny_moduleformer, text):
    assert complaint in refused(verb, tiny_moduleformer, *flags, *(text if verb == "prune" else ()))


@pytest.fixture(scope="module")
def headless(tiny_llama, converted_llama, tmp_path_factory) -> dict[str, Path]:
    """Models whose causal head transformers would draw at random, or that see what they are to predict."""
    folder = tmp_path_factory.mktemp("headless")
    for name, source in (("dense classifier", tiny_llama), ("classifier", converted_llama)):
        shutil.copytree(source, folder / name)
        (folder / name / "SHA256SUMS").unlink(missing_ok=True)
        for path in (folder / name).glob("model*.safetensors"):
            tensors = load_file(path)
            tensors.pop("lm_head.weight", None)
            save_file(tensors, path, metadata={"format": "pt"})
        index = folder / name / "model.safetensors.index.json"
        if index.is_file():
            known = json.loads(index.read_text())
            known["weight_map"].pop("lm_head.weight")
            index.write_text(json.dumps(known))
    for family in ("bert", "roberta"):
        tiny_checkpoint(folder / family, family)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("verb", "name", "complaint"),
    [
        ("tune", "dense classifier", "has no lm_head.weight; give a causal language model"),
        ("tune", "classifier", "has no lm_head.weight; give a causal language model"),
        ("analyze", "classifier", "has no lm_head.weight; give a causal language model"),
        ("tune", "bert", "is an encoder, which predicts no next token"),
        ("tune", "roberta", "is an encoder, which predicts no next token"),
    ],
)
def test_a_model_without_a_language_head(verb, name, complaint, headless, text_file, tmp_path, capsys):
    flags = ["--model", headless[name], "--output", tmp_path / "out", "--sequence-length", 64]
    flags += ["--domains", f"a={text_file}"] if verb == "analyze" else ["--text", text_file, "--steps", 1]
    assert main([verb, *map(str, flags), "--quiet"]) == 2
    assert f"--model: {headless[name]} {complaint}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tied_head_is_not_missing(text_file, tmp_path):
    tiny_checkpoint(tmp_path / "tied", "llama", tie_word_embeddings=True)
    flags = ["--model", tmp_path / "tied", "--output", tmp_path / "out", "--text", text_file, "--steps", 1]
    flags += ["--sequence-length", 64, "--tokens-per-step", 64, "--held-out-tokens", 64, "--quiet"]
    assert main(["tune", *map(str, flags)]) == 0


@pytest.mark.parametrize(
    ("model", "field", "value", "complaint"),
    [
        ("converted_llama", "num_experts_per_tok", 99, "num_experts_per_tok: 99 is more than num_experts"),
        ("converted_llama", "emoe_layers", [0, 1], "name different layers"),
        ("tiny_moduleformer", "n_layer", None, "n_layer: Field required"),
        ("tiny_moduleformer", "n_layer", 10**9, "says n_layer=1000000000, no model has that"),
        ("tiny_moduleformer", "mlp_groups", [[4]], "need an entry a layer"),
        ("tiny_moduleformer", "k_mlp", 99, "k_mlp=99 must lie between 1 and n_mlp_experts"),
        ("tiny_moduleformer", "n_mlp_experts", 10**9, "n_mlp_experts: Input should be less than"),
        ("tiny_moduleformer", "gate_type", "cosine", "gate_type='cosine' is unknown"),
        ("tiny_moduleformer", "sample_topk", "x", "sample_topk: Input should be a valid integer"),
    ],
)
def test_damaged_config(model, field, value, complaint, refused, text, tmp_path, request):
    folder = shutil.copytree(request.getfixturevalue(model), tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text()) | {field: value}
    (folder / "config.json").write_text(json.dumps({key: v for key, v in config.items() if v is not None}))
    assert complaint in refused("prune", folder, *text, "--keep", 0.5)
    assert complaint in refused("extend", folder, "--experts", 1)


def test_all_on_cannot_be_counted_hard(refused, tiny_llama, settings, text, tmp_path):
    emoe.convert(str(tiny_llama), output=tmp_path / "all", **settings | {"top_k": 8})
    line = refused("prune", tmp_path / "all", *text, "--keep", 0.5, "--count", "hard")
    assert "every token uses every expert" in line


def test_an_output_in_the_way_stays(converted_llama, text, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for more in ((), ("--overwrite",)):
        flags = ["extend", "--model", str(converted_llama), "--experts", "1", "--output", str(tmp_path / "mine"), *more]
        assert main(flags) == 2
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    assert Path(converted_llama).is_dir()
