"""`emoe finetune`: what lies on the disk afterwards, what trains, interruptions."""

from __future__ import annotations

import fcntl
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.labelled import sentences, write_csv, write_glue, write_task
from support.scripts import script
from support.tiny import tiny_checkpoint

from emoe.errors import Busy, UserError
from emoe.finetuning import tune
from emoe.finetuning.evaluate import evaluate
from emoe.finetuning.model import load_tokenizer
from emoe.finetuning.settings import EvalConfig, FinetuneConfig
from emoe.finetuning.texts import IGNORED, texts_of
from emoe.finetuning.trainer import LikeLengths, Rows, Tuner
from emoe.finetuning.tune import finetune
from emoe.runtime import sole_writer
from emoe.tasks import get
from emoe.tasks.spec import Example


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def test_a_run_leaves_what_the_comparison_reads(arm_settings, tmp_path):
    first, second = finetune(arm_settings(seeds="0,3", max_steps=30, learning_rate=3e-3))
    folder = tmp_path / "out" / "seed-0"
    assert sorted(p.name for p in folder.iterdir()) == ["log.jsonl", "model", "predictions", "run.json"]
    assert [p.name for p in (tmp_path / "out").iterdir() if p.name.startswith(".")] == []
    assert first == json.loads((folder / "run.json").read_text())
    assert (first["seed"], second["seed"], first["steps"]) == (0, 3, 30)
    assert first["duplicates_removed"] == {"own-validation": 0, "own": 0, "far": 3}
    assert first["train_examples"] == 93
    roles = {name: facts["role"] for name, facts in first["readings"]["as-trained"].items()}
    assert roles == {"own-validation": "id-validation", "own": "id-test", "far": "ood"}
    for reading in ("as-trained", "dense"):
        found = lines(folder / "predictions" / reading / "far.jsonl")
        facts = first["readings"][reading]["far"]
        assert len(found) == facts["examples"] == 27
        recall = [[r["prediction"] == label for r in found if r["label"] == label] for label in (0, 1)]
        assert facts["score"] == pytest.approx(sum(sum(hits) / len(hits) for hits in recall) / 2)
        assert all(max(range(2), key=r["scores"].__getitem__) == r["prediction"] for r in found)
    log = lines(folder / "log.jsonl")
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(2, 31, 2))
    router = [entry["router"]["2"] for entry in log if "loss" in entry]
    assert router[0]["overlap"] is None
    for facts in router[1:]:
        assert 0 <= facts["overlap"] <= 1
        assert 0 < facts["entropy"] <= 1
        assert sum(facts["frequencies"]) == pytest.approx(4, abs=0.01)  # K of them a token
    scores = {entry["step"]: entry["validation"] for entry in log if "validation" in entry}
    assert first["validation_score"] == max(scores.values()) == scores[first["selected_step"]]
    assert first["readings"]["as-trained"]["own-validation"]["score"] == pytest.approx(max(scores.values()))
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


def test_two_processes_do_not_train_one_seed(arm_settings, tmp_path):
    """Whichever of its seeds the other call is at."""
    settings = arm_settings(output=str(tmp_path / "run"), seeds="0,1", resume=True)
    for seed in (0, 1):
        with sole_writer(tmp_path / "run" / f".base-{seed}"), pytest.raises(Busy, match="another process is writing"):
            finetune(settings)
    assert not list((tmp_path / "run").glob("seed-*"))


def test_what_another_call_has_finished_stays(arm_settings, tmp_path, monkeypatch):
    """It ends between our first look at the folder and our lock on it."""
    record, lock = tmp_path / "out" / "seed-0" / "run.json", tune.scratch_directory

    def late(*arguments):
        record.parent.mkdir(parents=True)
        record.write_text('{"by": "another"}')
        return lock(*arguments)

    monkeypatch.setattr(tune, "scratch_directory", late)
    assert finetune(arm_settings(resume=True)) == [{"by": "another"}]


def test_a_folder_that_its_last_writer_removes_is_made_again(tmp_path, monkeypatch):
    """Between our opening it and our lock."""
    folder, lock, calls = tmp_path / "work", fcntl.flock, []

    def late(descriptor, how):
        calls.append(how)
        if len(calls) == 1:
            folder.rmdir()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with sole_writer(folder):
        assert folder.is_dir()
        with pytest.raises(Busy), sole_writer(folder):
            pass


def test_a_folder_behind_a_link_to_nowhere_cannot_be_made(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="choose another name"), sole_writer(tmp_path / "out" / "work"):
        pass


def test_states_that_a_kill_left_in_a_finished_run_go(arm_settings, tmp_path):
    """Behind run.json, of one of two seeds."""
    settings = {"max_steps": 2, "eval_steps": 2, "resume": True}
    finetune(arm_settings(**settings))
    left = tmp_path / "out" / "seed-0" / ".training" / "checkpoint-2"
    for seeds in ("0", "0,1"):
        left.mkdir(parents=True)
        finetune(arm_settings(**settings, seeds=seeds))
        assert not left.parent.exists()


def test_a_kill_while_an_earlier_run_is_removed(arm_settings, tmp_path, killed_in_removing):
    """Half of it would be no run of ours, which --overwrite does not touch."""
    settings = {"max_steps": 2, "eval_steps": 2, "overwrite": True}
    finetune(arm_settings(**settings))
    with killed_in_removing():
        finetune(arm_settings(**settings))
    (record,) = finetune(arm_settings(**settings))
    assert record["steps"] == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["seed-0"]


def test_one_folder_holds_one_arm(arm_settings):
    finetune(arm_settings(max_steps=2, eval_steps=2))
    with pytest.raises(UserError, match=r"--output: .*seed-0 was made with other .* or another --output$"):
        finetune(arm_settings(max_steps=2, eval_steps=2, seeds="1", learning_rate=2e-3))


def test_overwrite_keeps_the_old_run_until_the_new_one_can_start(arm_settings, tmp_path, experts):
    finetune(arm_settings(max_steps=2, eval_steps=2))
    before = (tmp_path / "out" / "seed-0" / "run.json").read_text()
    with pytest.raises(UserError, match="--top-k: 9"):
        finetune(arm_settings(overwrite=True, top_k=9))
    assert (tmp_path / "out" / "seed-0" / "run.json").read_text() == before
    (record,) = finetune(arm_settings(overwrite=True, max_steps=4))
    assert record["steps"] == 4
    (tmp_path / "cat" / "seed-0").mkdir(parents=True)
    (tmp_path / "cat" / "seed-0" / "cat.png").write_bytes(b"cat")
    with pytest.raises(UserError, match="is not a run of ours"):
        finetune(arm_settings(overwrite=True, output=str(tmp_path / "cat")))


def test_lora_trains_its_matrices_and_the_head_only(arm_settings, tmp_path):
    for target, matrices in (("attention", 2 * 4 * 4), ("attention+ffn", 2 * 7 * 4)):
        finetune(arm_settings(tuning="lora", lora_target=target, lora_r=4, output=str(tmp_path / target)))
        saved = load_file(tmp_path / target / "seed-0" / "model" / "adapter_model.safetensors")
        assert len([name for name in saved if "lora_" in name]) == matrices
        assert [name for name in saved if "lora_" not in name] == ["base_model.model.score.weight"]


def test_auxiliary_losses_spread_or_gather_the_load(arm_settings, tmp_path):
    entropies = {}
    for loss in ("mi_weight", "concentration_weight"):
        given = {"method": "emoe-learn", "output": str(tmp_path / loss), "max_steps": 20, "learning_rate": 1e-2}
        finetune(arm_settings(**given, **{loss: 5.0}))
        last = [e for e in lines(tmp_path / loss / "seed-0" / "log.jsonl") if "router" in e][-1]
        entropies[loss] = last["router"]["2"]["entropy"]
    assert entropies["mi_weight"] > entropies["concentration_weight"] + 0.02


def test_steps_in_parts_are_steps(arm_settings, tmp_path):
    """Eight examples at once, or four and four."""
    found = []
    for batch, parts in ((8, 1), (4, 2)):
        output = str(tmp_path / str(parts))
        finetune(arm_settings(batch_size=batch, accumulation=parts, output=output, max_steps=4))
        found.append(weights(tmp_path / str(parts) / "seed-0"))
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-3, atol=2e-4, msg=name)


def interrupted(config: FinetuneConfig, step: int, monkeypatch) -> None:
    """A run that a crash ends in this step, counted over all its seeds."""
    loss, count = Tuner.compute_loss, [0]

    def crash(self, *arguments, **keywords):
        count[0] += 1
        if count[0] == step:
            raise RuntimeError("power cut")
        return loss(self, *arguments, **keywords)

    monkeypatch.setattr(Tuner, "compute_loss", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        finetune(config)
    monkeypatch.undo()


@pytest.mark.parametrize(("grouped", "method"), [(False, "dropout"), (True, "emoe")])
def test_a_resumed_run_equals_an_undisturbed_one(grouped, method, arm_settings, tmp_path, monkeypatch):
    """Stopped by a crash in step 7 of the second seed, gone on from the state of step 4, dropout's draws too."""
    arm_settings = partial(arm_settings, group_by_length=grouped, method=method)
    wanted = finetune(arm_settings(seeds="0,1", tuning="full", output=str(tmp_path / "whole")))
    interrupted(arm_settings(seeds="0,1"), 15, monkeypatch)
    out = tmp_path / "out"
    assert (out / "seed-0" / "run.json").exists()
    assert not (out / "seed-1" / "run.json").exists()
    with pytest.raises(UserError, match="add --resume to go on"):
        finetune(arm_settings(seeds="0,1"))
    with pytest.raises(UserError, match=r"--resume: .* other settings \(learning_rate: 0.001, now 0.002\); "):
        finetune(arm_settings(seeds="0,1", resume=True, learning_rate=2e-3))
    spent = next((out / "seed-1" / ".training" / "checkpoint-4").glob("emoe_cost.json"))
    spent.write_text(json.dumps({"seconds": 4000.0, "steps": 4, "elapsed": 5000.0, "peak_bytes": 7 << 40}))
    done = (out / "seed-0" / "run.json").stat().st_mtime_ns
    found = finetune(arm_settings(seeds="0,1", resume=True))
    assert (out / "seed-0" / "run.json").stat().st_mtime_ns == done
    for seed in (0, 1):
        resumed, undisturbed = weights(out / f"seed-{seed}"), weights(tmp_path / "whole" / f"seed-{seed}")
        assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)
        assert found[seed]["readings"] == wanted[seed]["readings"]
        log = lines(out / f"seed-{seed}" / "log.jsonl")
        assert log == lines(tmp_path / "whole" / f"seed-{seed}" / "log.jsonl")  # the best weights may be older
        assert [entry["step"] for entry in log if "loss" in entry] == [2, 4, 6, 8]
    cost = {key: found[1][key] for key in ("seconds", "seconds_per_step", "peak_memory_bytes")}
    assert 5000 < cost["seconds"] < 5100
    assert 500 < cost["seconds_per_step"] < 510  # of eight steps
    assert cost["peak_memory_bytes"] == 7 << 40


def test_the_log_of_a_resumed_run_is_that_of_an_undisturbed_one(arm_settings, tmp_path, monkeypatch):
    """Gone on from a state between two lines, of steps 4 and 6."""
    arm_settings = partial(arm_settings, eval_steps=5, log_steps=2)
    finetune(arm_settings(output=str(tmp_path / "whole")))
    interrupted(arm_settings(), 7, monkeypatch)
    finetune(arm_settings(resume=True))
    wanted = lines(tmp_path / "whole" / "seed-0" / "log.jsonl")
    assert lines(tmp_path / "out" / "seed-0" / "log.jsonl") == wanted
    assert [entry["step"] for entry in wanted if "loss" in entry] == [2, 4, 5, 6, 8]


def test_batches_of_like_length_have_one_order_for_all_arms():
    """Whatever an arm drew from the global generator; another order for each epoch; less padding."""
    rows = Rows([{"input_ids": [0] * (1 + 7 * i % 40)} for i in range(200)])
    orders = []
    for draws, epoch in ((0, 0), (5, 0), (0, 1)):
        torch.rand(draws)
        sampler = LikeLengths(8, rows, seed=3)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(200))
    padded = [8 * max(len(rows[i]["input_ids"]) for i in orders[0][start : start + 8]) for start in range(0, 200, 8)]
    assert sum(padded) < 1.2 * sum(len(row["input_ids"]) for row in rows.rows)


def test_a_resumed_run_is_as_patient_as_an_undisturbed_one(arm_settings, monkeypatch):
    """Two of three validations without a better score lie before the crash."""
    patient = {"max_steps": 40, "eval_steps": 2, "patience": 3, "learning_rate": 1e-9}
    interrupted(arm_settings(**patient), 8, monkeypatch)
    (record,) = finetune(arm_settings(**patient, resume=True))
    assert record["steps"] == 8


def test_files_that_a_kill_cut_short_are_left_out(arm_settings, tmp_path, monkeypatch):
    """The Trainer's last file in one state, and a line of the log behind the first of its closing braces."""
    (wanted,) = finetune(arm_settings(output=str(tmp_path / "whole")))
    interrupted(arm_settings(), 7, monkeypatch)
    folder = tmp_path / "out" / "seed-0"
    cut = folder / ".training" / "checkpoint-6"
    shutil.copytree(folder / ".training" / "checkpoint-4", cut)
    facts = (cut / "trainer_state.json").read_text()
    (cut / "trainer_state.json").write_text(facts[: len(facts) // 2])
    log = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(log + log[: log.index("}") + 1])
    (found,) = finetune(arm_settings(resume=True))
    assert found["readings"] == wanted["readings"]
    assert [entry["step"] for entry in lines(folder / "log.jsonl") if "loss" in entry] == [2, 4, 6, 8]


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(arm_settings, tmp_path, monkeypatch):
    loss = Tuner._stop_unless_finite

    def spoil(self, name, value, step):
        loss(self, name, value * (float("nan") if step == 7 else 1), step)

    monkeypatch.setattr(Tuner, "_stop_unless_finite", spoil)
    with pytest.raises(UserError, match=r"the loss is nan in step 7: lower --learning-rate .* last good .*point-4"):
        finetune(arm_settings())
    kept = load_file(tmp_path / "out" / "seed-0" / ".training" / "checkpoint-4" / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in kept.values())


def test_early_stopping_waits_patiently(arm_settings):
    (record,) = finetune(arm_settings(max_steps=40, eval_steps=2, patience=2, learning_rate=1e-9))
    assert record["steps"] == 6  # the first, and two that were no better


def test_early_stopping_looks_at_validation_alone(arm_settings, tmp_path):
    """Where labels are swapped, scores fall while the model learns: of the validation set, this ends the run."""
    swap, steps = {"yes": "no", "no": "yes"}, {}
    for swapped in (("validation",), ("test", "far")):
        task = write_task(tmp_path / swapped[0])
        for name in swapped:
            file = tmp_path / swapped[0] / f"{name}.csv"
            rows = [line.rsplit(",", 1) for line in file.read_text().splitlines()[1:]]
            write_csv(file, [(text, swap[label]) for text, label in rows])
        given = {"task": str(task), "output": str(tmp_path / "out" / swapped[0]), "learning_rate": 3e-3}
        (record,) = finetune(arm_settings(**given, max_steps=40, eval_steps=4, patience=3))
        steps[swapped[0]] = record["steps"]
        log = [e["loss"] for e in lines(tmp_path / "out" / swapped[0] / "seed-0" / "log.jsonl") if "loss" in e]
        assert log[-1] < log[0]
    assert steps["validation"] < 40 == steps["test"]


def test_tensorboard_gets_curves(arm_settings, tmp_path):
    pytest.importorskip("tensorboardX")
    finetune(arm_settings(tensorboard=True, max_steps=4))
    assert list((tmp_path / "out" / "seed-0" / "tensorboard").glob("events*"))


def test_instructions_have_labels_on_the_answer_alone(arm_settings, tmp_path):
    """And on the token that ends it."""
    tokenizer = load_tokenizer(Path(arm_settings().model))
    (tmp_path / "alpaca.json").write_text("[]")
    texts = texts_of(get(str(tmp_path / "alpaca.json")), tokenizer, 40)
    answer = [*tokenizer("watch", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    prompt = tokenizer("find neurons").input_ids
    short, long = texts.encode([Example("0", "find neurons", "watch", 0), Example("1", "a " * 39, "watch", 0)])
    assert short["input_ids"] == [*prompt, *answer]
    assert short["labels"] == [IGNORED] * len(prompt) + answer
    assert len(long["labels"]) == len(long["input_ids"]) == 40
    batch = texts.collate([short, long])
    assert batch["labels"][0].tolist() == short["labels"] + [IGNORED] * (40 - len(short["labels"]))
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="--model: its tokenizer has no end token"):
        texts_of(texts.task, tokenizer, 40)


@pytest.mark.parametrize(("family", "positions"), [("bert", 128), ("roberta", 130)])  # RoBERTa's first two stay empty
def test_texts_end_where_the_model_s_positions_do(family, positions, arm_settings, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family)
    rows = [(" ".join([text] * 30), label) for text, label in sentences(40, 1)]
    task = write_task(tmp_path / "task")
    for part in ("train", "far"):
        write_csv(tmp_path / "task" / f"{part}.csv", rows)
    cut = {"model": str(dense), "experts": 8, "top_k": 4, "layers": "2:4", "task": str(task), "domains": "far"}
    said = []
    write_csv(tmp_path / "task" / "train.csv", [(f"{text} watch", label) for text, label in rows])
    (record,) = finetune(arm_settings(**cut, max_length=600, max_steps=2, eval_steps=2), say=said.append)
    note = f"--max-length lowered from 600 to the model's {positions}"
    assert said == record["notes"] == [note]
    said.clear()
    report = evaluate(EvalConfig(model=str(tmp_path / "out" / "seed-0"), domains="far"), say=said.append)
    assert said == [note]
    assert report["sets"]["far"] == record["readings"]["as-trained"]["far"]
    said.clear()
    again = EvalConfig(model=str(tmp_path / "out" / "seed-0"), domains="far", max_length=positions)
    assert evaluate(again, say=said.append)["sets"] == report["sets"]
    assert said == []


def test_instructions_train_on_answers(arm_settings, tmp_path, tiny_llama):
    said = [" ".join(text.split()[:3]) for text, _ in sentences(200, 5)]  # just below 128 tokens, framed
    data = [{"instruction": f"say {a}", "input": "", "output": a} for a in said]
    (tmp_path / "alpaca.json").write_text(json.dumps(data))
    config = arm_settings(task=str(tmp_path / "alpaca.json"), max_steps=30, learning_rate=3e-3, max_length=128)
    (record,) = finetune(config)
    log = [entry["loss"] for entry in lines(tmp_path / "out" / "seed-0" / "log.jsonl") if "loss" in entry]
    assert log[-1] < 0.8 * log[0]
    facts = record["readings"]["as-trained"]["alpaca"]
    assert facts["metric"] == "token_accuracy"
    assert facts["metrics"]["perplexity"] > 1
    report = evaluate(EvalConfig(model=str(tmp_path / "out" / "seed-0")))
    assert report["sets"]["alpaca"] == facts


def test_a_begun_seed_goes_on_with_the_same_texts(arm_settings, tmp_path, monkeypatch):
    task = write_task(tmp_path / "task")
    interrupted(arm_settings(task=str(task)), 5, monkeypatch)
    write_csv(tmp_path / "task" / "train.csv", sentences(50, 8))
    with pytest.raises(UserError, match=r"--resume: .*seed-0 was made with other data: the texts of training"):
        finetune(arm_settings(task=str(task), resume=True))
    (record,) = finetune(arm_settings(task=str(task), overwrite=True))
    assert record["train_examples"] == 50


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {"tuning": "full", "gate": "discriminant"}),  # an encoder; a gate fitted on the training texts
        ("gpt2", {"tuning": "lora", "lora_target": "attention+ffn"}),  # transposed weights, no padding token of its own
    ],
)
def test_other_families_from_a_dense_model(family, changes, arm_settings, tmp_path):
    dense = tiny_checkpoint(tmp_path / "dense", family)
    cut = {"model": str(dense), "experts": 8, "top_k": 4, "layers": "2:4"}
    task = str(write_task(tmp_path / "task", train=400))
    (record,) = finetune(arm_settings(**cut, **changes, task=task, max_steps=4))
    assert (record["num_experts"], record["top_k"], record["emoe_layers"]) == (8, 4, [2, 3])
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["seed-0"]
    report = evaluate(EvalConfig(model=str(tmp_path / "out" / "seed-0"), read_as="dense", domains="far"))
    assert report["sets"]["far"] == record["readings"]["dense"]["far"]


def test_the_example_for_glue_runs(tiny_llama, tmp_path, monkeypatch, capsys):
    data = write_glue(tmp_path / "data")
    flags = ["--model", str(tiny_llama), "--data-dir", str(data), "--output", str(tmp_path / "glue")]
    flags += ["--max-steps", "2", "--seeds", "0,1", "--experts", "8", "--layers", "2:4"]
    monkeypatch.setattr("sys.argv", ["finetune_glue", *flags])
    assert script("finetune_glue").main() == 0
    found = capsys.readouterr()
    assert [line.split()[:2] for line in found.out.splitlines()] == [
        [method, name] for method in ("vanilla", "emoe") for name in ("sst2-validation", "sst2")
    ]
    assert "domain imdb is left out" in found.err
    assert "--epochs has no effect" not in found.err  # the recipe's, not the user's
    monkeypatch.setattr("emoe.cli.progress.LINE_SECONDS", 0.0)
    single = ["--seeds", "0", "--methods", "emoe", "--output", str(tmp_path / "one")]
    monkeypatch.setattr("sys.argv", ["finetune_glue", *flags, *single])
    assert script("finetune_glue").main() == 0
    found = capsys.readouterr()
    assert found.out.splitlines()[0].endswith(" ± –")
    assert "2/2 steps, seed 0" in found.err
    typed = ["--methods", "vanilla,emo", "--output", str(tmp_path / "none")]
    monkeypatch.setattr("sys.argv", ["finetune_glue", *flags, *typed])
    with pytest.raises(UserError, match="unknown method 'emo'"):
        script("finetune_glue").main()
    assert not (tmp_path / "none").exists()
