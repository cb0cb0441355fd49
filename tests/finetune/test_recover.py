"""Recovery brings a converted model nearer to the dense one, and loses nothing on the way."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

import emoe
from emoe.cli.main import main


@pytest.fixture
def flags(converted_llama, text_file, tmp_path):
    return [
        *("recover", "--model", str(converted_llama), "--output", str(tmp_path / "out"), "--text", str(text_file)),
        *("--tokens-per-step", "256", "--sequence-length", "64", "--held-out-tokens", "256", "--learning-rate", "3e-3"),
        *("--precision", "float32"),
    ]


def weights(folder) -> dict[str, torch.Tensor]:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_it_comes_nearer_to_dense(flags, converted_llama, tmp_path, capsys):
    assert main([*flags, "--steps", "30", "--budgets", "0.25", "--budgets", "0.5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["top_k"] for row in report["rows"]] == [2, 4, 6]
    for row in report["rows"][:2]:
        assert row["after"]["training domain"] < 0.9 * row["before"]["training domain"]
    before, after = weights(converted_llama), weights(tmp_path / "out")
    gates = [name for name in before if ".router." in name]
    assert all(torch.equal(before[name], after[name]) for name in gates)
    assert not torch.equal(before["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts_per_tok"] == 3
    assert config["emoe_provenance"]["history"][0]["verb"] == "recover"
    assert emoe.export(tmp_path / "out", tmp_path / "dense", verify_tokens=256)["identical"] == 0
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("loss", ["kl", "hidden"])
def test_gates_can_be_learned(loss, flags, converted_llama, tmp_path):
    assert main([*flags, "--steps", "5", "--gates", "learned", "--loss", loss, "--train", "ffn", "--quiet"]) == 0
    before, after = weights(converted_llama), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.endswith("router.weight") for name in changed)
    assert all(".mlp." in name for name in changed)


def test_a_step_in_parts_is_a_step(flags, tmp_path):
    """Four sequences at once, or one after the other."""
    flags = [*flags, "--steps", "3", "--budgets", "0.5", "--quiet"]
    assert main([*flags, "--batch-sequences", "4"]) == 0
    whole = weights(tmp_path / "out")
    assert main([*flags, "--batch-sequences", "1", "--overwrite"]) == 0
    for name, parts in weights(tmp_path / "out").items():
        torch.testing.assert_close(parts, whole[name], rtol=1e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("tokens", [320, 100, 32])  # five sequences a step, part of a second, less than one
def test_it_trains_on_the_text_that_it_reports(tokens, flags, tmp_path, capsys, monkeypatch):
    """No sequence twice, none but those of its steps, and every forward call of a step of the same size."""
    from emoe.finetuning import recover

    loss, calls = recover._Distiller.compute_loss, []

    def noting(self, model, inputs, *arguments, **keywords):
        calls.append((self.state.global_step, [tuple(row) for row in inputs["input_ids"].tolist()]))
        return loss(self, model, inputs, *arguments, **keywords)

    monkeypatch.setattr(recover._Distiller, "compute_loss", noting)
    assert main([*flags, "--tokens-per-step", str(tokens), "--steps", "4", "--json"]) == 0
    seen = [row for _, rows in calls for row in rows]
    assert json.loads(capsys.readouterr().out)["tokens"] == 64 * len(seen) == 64 * 4 * max(1, tokens // 64)
    assert len(set(seen)) == len(seen)
    assert len({len(rows) for _, rows in calls}) == 1


def test_quality_is_measured_alike_before_and_after(flags, capsys):
    """Trained in bfloat16, at a rate that changes nothing."""
    flags = [*flags, "--precision", "bfloat16", "--learning-rate", "1e-12", "--steps", "1", "--json"]
    assert main(flags) == 0
    for row in json.loads(capsys.readouterr().out)["rows"]:
        assert row["after"]["training domain"] == pytest.approx(row["before"]["training domain"], rel=1e-6)


def test_a_resumed_run_equals_an_undisturbed_one(flags, tmp_path, monkeypatch):
    """Stopped by a crash in step 7, gone on from the state of step 4."""
    from emoe.finetuning import recover

    flags = [*flags, "--steps", "10", "--checkpoint-steps", "4", "--budgets", "0.25", "--budgets", "0.5", "--quiet"]
    assert main(flags) == 0
    undisturbed, log = weights(tmp_path / "out"), (tmp_path / "out" / "log.jsonl").read_text()
    assert [json.loads(line)["step"] for line in log.splitlines()] == [4, 5, 8, 10]
    shutil.rmtree(tmp_path / "out")
    loss, count = recover._Distiller.compute_loss, [0]

    def crash(self, *arguments, **keywords):
        count[0] += 1
        if count[0] == 7:
            raise RuntimeError("power cut")
        return loss(self, *arguments, **keywords)

    monkeypatch.setattr(recover._Distiller, "compute_loss", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        main(flags)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert main(flags) == 2  # an unfinished recovery lies there
    assert main([*flags, "--resume"]) == 0
    resumed = weights(tmp_path / "out")
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)
    assert (tmp_path / "out" / "log.jsonl").read_text() == log


def test_sequences_are_no_longer_than_the_model_takes(flags, tmp_path, capsys):
    longest = transformers.AutoConfig.from_pretrained(flags[2]).max_position_embeddings
    assert main([*flags, "--sequence-length", str(longest + 1), "--steps", "1", "--tokens-per-step", str(longest)]) == 0
    assert f"--sequence-length lowered from {longest + 1} to the model's {longest}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "0"], "--steps"),
        (["--budgets", "1.5"], "--budgets: 1.5 is not a share"),
        (["--text", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--gates", "lerned"], "--gates"),
        (["--learning-rate", "1e30", "--steps", "10"], "lower --learning-rate"),
    ],
)
def test_bad_input(arguments, complaint, flags, tmp_path, capsys):
    if arguments[0] == "--text":
        flags = [f for i, f in enumerate(flags) if f != "--text" and flags[i - 1] != "--text"]
    assert main([*flags, *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer(flags, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(flags[2], model)
    (model / "tokenizer.json").unlink()
    for verb in ("recover", "tune"):
        assert main([verb, "--model", str(model), *flags[3:], "--steps", "1"]) == 2
        assert f"--model: no usable tokenizer in {model}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "lama"}'])
def test_a_folder_that_is_no_model(config, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    if config:
        (folder / "config.json").write_text(config)
    assert main(["tune", "--model", str(folder), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    missing = f"--model: cannot read {folder / 'config.json'}, it does not exist; give the folder of"
    assert (f"--model: {folder} is not the folder of a model" if config else missing) in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_weights_that_cannot_be_read_are_not_a_full_disk(damage, flags, tiny_llama, converted_llama, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    if damage == "missing":
        weights.unlink()
    given = ["--text", flags[flags.index("--text") + 1], "--output", str(tmp_path / "out"), "--steps", "1", "--quiet"]
    teacher = ["recover", "--model", str(converted_llama), "--teacher", str(folder)]
    for flag, call in (("--model", ["tune", "--model", str(folder)]), ("--teacher", teacher)):
        assert main([*call, *given]) == 2
        error = capsys.readouterr().err
        assert f"{flag}: {folder}" in error and "--output" not in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("verb", ["recover", "tune"])
def test_several_processes_are_refused(verb, flags, tmp_path, monkeypatch, capsys):
    """Each would write the output."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([verb, *flags[1:]]) == 2
    error = capsys.readouterr().err
    assert "WORLD_SIZE=2" in error and "convert, finetune and pretrain take several" in error
    assert [path.name for path in tmp_path.iterdir()] == []


def test_bad_models_and_outputs(flags, tiny_llama, converted_llama, text_file, capsys):
    dense = [str(tiny_llama) if f == str(converted_llama) else f for f in flags]
    assert main(dense) == 2
    assert "is not a converted checkpoint (model_type 'llama'); convert it first" in capsys.readouterr().err
    own = [*flags[: flags.index("--output") + 1], str(converted_llama), "--overwrite"]
    assert main(own) == 2
    assert "overlaps the model's own folder" in capsys.readouterr().err
    assert main([*flags[: flags.index("--output") + 1], str(text_file)]) == 2
    assert "is a file; choose another name" in capsys.readouterr().err


def test_overwrite_touches_nothing_but_a_converted_checkpoint(flags, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cat.png").write_bytes(b"cat")
    assert main([*flags, "--overwrite"]) == 2
    assert "is not a checkpoint of ours, --overwrite will not touch it" in capsys.readouterr().err
    assert (tmp_path / "out" / "cat.png").read_bytes() == b"cat"


def test_a_model_with_other_weights_needs_its_teacher_named(flags, tiny_llama, settings, text_file, tmp_path, capsys):
    """All experts on is no longer the dense model there."""
    emoe.convert(str(tiny_llama), output=tmp_path / "refit", **(settings | {"refit_outputs": True}))
    flags[flags.index("--model") + 1] = str(tmp_path / "refit")
    assert main([*flags, "--steps", "2", "--quiet"]) == 2
    assert "--teacher: missing" in capsys.readouterr().err
    assert main([*flags, "--steps", "2", "--quiet", "--teacher", "smolm2-135m"]) == 2
    assert "--teacher: unknown model 'smolm2-135m' (did you mean 'smollm2-135m'?)" in capsys.readouterr().err
    assert main([*flags, "--steps", "2", "--quiet", "--teacher", str(tiny_llama)]) == 0


def test_a_model_with_added_experts(flags, tiny_llama, converted_llama, tmp_path):
    """Its layers have more experts than the budget goes to."""
    bigger = str(tmp_path / "bigger")
    assert main(["extend", "--model", str(converted_llama), "--experts", "2", "--output", bigger, "--quiet"]) == 0
    flags = [bigger if flag == str(converted_llama) else flag for flag in flags]
    assert main([*flags, "--teacher", str(tiny_llama), "--steps", "1", "--quiet"]) == 0
