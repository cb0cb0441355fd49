"""`emoe eval`: saved runs score as they did, read as trained or otherwise; what does not fit is refused."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import shutil
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.labelled import write_csv, write_glue, write_task

import emoe
from emoe.errors import UserError
from emoe.finetuning.evaluate import evaluate
from emoe.finetuning.settings import EvalConfig
from emoe.finetuning.tune import finetune


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("method", "tuning"),
    [
        *itertools.product(["vanilla", "emoe-learn", "gmoe"], ["full", "lora", "head"]),
        ("random", "full"),  # what a token gets must not hang on the batch: another one here than in training
        ("bottom-k", "full"),
    ],
)
def test_a_saved_model_scores_as_it_did(method, tuning, arm_settings, tmp_path):
    config = arm_settings(method=method, tuning=tuning, max_steps=4, group_by_length=True)
    if method == "gmoe" and tuning != "full":
        with pytest.raises(UserError, match="use --tuning full"):
            finetune(config)
        return
    (record,) = finetune(config)
    for reading, sets in record["readings"].items():
        report = evaluate(EvalConfig(model=str(tmp_path / "out" / "seed-0"), read_as=reading, domains="own,far"))
        assert list(report["sets"]) == ["own", "far"]
        for name, facts in report["sets"].items():
            assert facts == sets[name], (reading, name)
    validated = [
        entry["validation"] for entry in lines(tmp_path / "out" / "seed-0" / "log.jsonl") if "validation" in entry
    ]
    (own,) = (facts for facts in record["readings"]["as-trained"].values() if facts["role"] == "id-validation")
    assert own["score"] == pytest.approx(max(validated))


def test_a_run_s_own_task_may_go(arm_settings, task_file, tmp_path, monkeypatch):
    folder = shutil.copytree(task_file.parent, tmp_path / "data")
    monkeypatch.chdir(folder)
    finetune(arm_settings(task=task_file.name, max_steps=2))
    run = EvalConfig(model=str(tmp_path / "out" / "seed-0"), domains="far")
    monkeypatch.chdir(tmp_path)
    found = evaluate(run)
    monkeypatch.chdir(folder)
    assert evaluate(run.model_copy(update={"task": task_file.name}))["sets"] == found["sets"]
    (folder / task_file.name).unlink()
    with pytest.raises(UserError, match=r"the run's own task is not to be had .*; --task names another"):
        evaluate(run)


def test_bfloat16_is_scored_in_bfloat16(arm_settings, tmp_path):
    (record,) = finetune(arm_settings(precision="bfloat16", max_steps=4))
    assert record["precision"] == "bfloat16"
    finetune(arm_settings(max_steps=4, output=str(tmp_path / "whole")))
    folders = [tmp_path / name / "seed-0" for name in ("out", "whole")]
    half, whole = ([r["scores"] for r in lines(f / "predictions/as-trained/far.jsonl")] for f in folders)
    assert half != whole
    evaluate(EvalConfig(model=str(folders[0]), domains="far", output=str(tmp_path / "again")))
    again = [r["scores"] for r in lines(tmp_path / "again" / "predictions" / "as-trained" / "far.jsonl")]
    again, half = torch.tensor(again), torch.tensor(half)
    assert torch.equal(again, again.bfloat16().float())
    torch.testing.assert_close(again, half, rtol=2e-2, atol=2e-2)  # in larger batches sums are rounded otherwise
    trained = load_file(folders[0] / "model" / "model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in trained.values())


def test_eval_refuses_what_does_not_fit(arm_settings, tmp_path, tiny_llama, monkeypatch):
    finetune(arm_settings(max_steps=2, eval_steps=2, discard_model=True))
    run = tmp_path / "out" / "seed-0"
    three = write_task(tmp_path / "three", **{"'yes']": "'yes', 'perhaps']"})
    turned = write_task(tmp_path / "turned", **{"['no', 'yes']": "['yes', 'no']"})
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    for given, complaint in (
        ({"model": str(run)}, "weights are gone"),
        ({"model": str(run.parent)}, "holds several runs"),
        ({"model": str(tmp_path)}, "is not a model folder"),
        ({"model": str(tiny_llama)}, "--task: missing"),
        ({"model": str(tiny_llama), "task": str(three)}, "has no classification head"),
        ({"model": str(tiny_llama), "lm_eval": "mmlu"}, "needs the package lm-eval"),
    ):
        with pytest.raises(UserError) as caught:
            evaluate(EvalConfig(**given))
        assert complaint in str(caught.value)
    shutil.rmtree(run)
    for tuning in ("full", "lora"):
        finetune(arm_settings(max_steps=2, eval_steps=2, tuning=tuning, overwrite=True))
        with pytest.raises(UserError, match=r"'neurons' has 3 labels .*, the model's head has 2"):
            evaluate(EvalConfig(model=str(run), task=str(three)))
        with pytest.raises(UserError, match=r"2 labels \(yes, no\), the model's head has 2 \(no, yes\)"):
            evaluate(EvalConfig(model=str(run), task=str(turned)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"--model: .* is not a model: "):
        evaluate(EvalConfig(model=str(tmp_path), task=str(three)))


@pytest.mark.parametrize("weights", [None, b"cut short"])
def test_eval_names_a_folder_without_sound_weights(weights, arm_settings, task_file, tmp_path):
    finetune(arm_settings(max_steps=2, eval_steps=2))
    model = tmp_path / "out" / "seed-0" / "model"
    if weights is None:
        (model / "model.safetensors").unlink()
    else:
        (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"^--model: .* is not a model: "):
        evaluate(EvalConfig(model=str(model), task=str(task_file)))


def test_an_adapter_finds_its_training_texts_where_they_have_gone(arm_settings, tiny_llama, tmp_path):
    data = write_glue(tmp_path / "data")
    settings = {"model": str(tiny_llama), "experts": 8, "layers": "2:4", "task": "sst2", "tuning": "lora"}
    (record,) = finetune(arm_settings(**settings, max_steps=2, eval_steps=2, data_dir=str(data)))
    moved = data.rename(tmp_path / "moved")
    report = evaluate(EvalConfig(model=str(tmp_path / "out" / "seed-0"), data_dir=str(moved)))
    assert report["sets"] == {"sst2": record["readings"]["as-trained"]["sst2"]}


def test_eval_counts_the_texts_that_the_run_trained_on(arm_settings, tmp_path):
    """None of a set that is merely not scored; those of a set that was not there at the time, and of another task."""
    text = "  far: {role: ood, file: far.csv}\n"
    task = write_task(tmp_path / "task", **{text: f"{text}  late: {{role: ood, file: late.csv}}\n"})
    train = list(csv.DictReader((tmp_path / "task" / "train.csv").read_text().splitlines()))
    settings = {"task": str(task), "max_steps": 2, "eval_steps": 2, "domains": ""}
    (record,) = finetune(arm_settings(**settings))
    assert [note.split(" cannot be read")[0] for note in record["notes"]] == ["domain late"]
    assert list(record["readings"]["as-trained"]) == ["own-validation", "own"]
    assert record["duplicates_removed"] == {"own-validation": 0, "own": 0, "far": 3}
    late = [(train[-1]["text"].upper(), train[-1]["label"]), (train[0]["text"], train[0]["label"]), ("watch it", "no")]
    write_csv(tmp_path / "task" / "late.csv", late)  # the last but one stands in far, so it left training
    run, said = str(tmp_path / "out" / "seed-0"), []
    report = evaluate(EvalConfig(model=run), say=said.append)
    assert report["seen_in_training"] == {"own": 0, "far": 0, "late": 1}
    assert said == ["late: the run trained on 1 of these 3 texts"]

    other = write_task(tmp_path / "other", **{"far.csv": "other.csv"})
    write_csv(tmp_path / "other" / "other.csv", [(row["text"], row["label"]) for row in train])
    said.clear()
    report = evaluate(EvalConfig(model=run, task=str(other), domains="far"), say=said.append)
    assert report["seen_in_training"] == {"far": 93}
    assert said == ["far: the run trained on 93 of these 96 texts"]

    write_csv(tmp_path / "task" / "train.csv", [(row["text"], row["label"]) for row in train[:50]])
    said.clear()
    assert evaluate(EvalConfig(model=run, domains="far"), say=said.append)["seen_in_training"] == {"far": 0}
    assert said == ["the run trained on 93 texts, its settings give 47 now; those count"]
    (tmp_path / "task" / "train.csv").unlink()
    said.clear()
    assert evaluate(EvalConfig(model=run, task=str(other), domains="far"), say=said.append)["seen_in_training"] == {}
    assert len(said) == 1
    assert said[0].startswith("texts that the run trained on are not counted, its training set is not to be had: ")


def test_eval_takes_the_lists_that_finetune_takes(arm_settings, tmp_path):
    data = str(write_glue(tmp_path / "data"))
    settings = {"task": "sst2", "data_dir": data, "max_steps": 2, "eval_steps": 2}
    (record,) = finetune(arm_settings(**settings, domains="sst2,"))
    assert list(record["readings"]["as-trained"]) == ["sst2-validation", "sst2"]
    run = str(tmp_path / "out" / "seed-0")
    assert list(evaluate(EvalConfig(model=run, domains="sst2,"))["sets"]) == ["sst2"]
    for absent, reason in (("imdb", "domain imdb is left out: "), (" , ", "it names no set")):
        with pytest.raises(UserError, match=rf"^--domains: nothing is left to score \({reason}"):
            evaluate(EvalConfig(model=run, domains=absent))


def test_eval_takes_the_length_that_it_is_given(arm_settings, tmp_path):
    """Else the run's own: at two tokens beside the special ones, most texts have lost what tells their class."""
    (record,) = finetune(arm_settings(max_steps=30, learning_rate=3e-3, max_length=32))
    run = str(tmp_path / "out" / "seed-0")
    scores = {length: evaluate(EvalConfig(model=run, max_length=length))["sets"] for length in (None, 32, 4)}
    assert scores[None] == scores[32] != scores[4]
    assert scores[None]["far"]["score"] == pytest.approx(record["readings"]["as-trained"]["far"]["score"])


@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    """The package lm-eval, played: its real benchmarks need the hub."""
    for name, code in {
        "__init__": "def simple_evaluate(model, tasks, limit):\n"
        "    assert tasks == ['mmlu', 'arc_easy'] and limit == 3\n"
        "    return {'results': {'mmlu': {'acc,none': float(model.pretrained.config.num_experts_per_tok)}}}\n",
        "models/__init__": "",
        "models/huggingface": "class HFLM:\n    def __init__(self, pretrained, tokenizer, batch_size):\n"
        "        self.pretrained = pretrained\n",
    }.items():
        path = tmp_path / "packages" / "lm_eval" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)  # the real one
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield {"lm_eval": "mmlu, arc_easy", "limit": 3}
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        del sys.modules[name]  # later tests must not take it for the package


def test_benchmarks_get_the_loaded_model(arm_settings, benchmarks):
    report = evaluate(EvalConfig(model=arm_settings().model, read_as="dense", **benchmarks))
    assert report["lm_eval"] == {"mmlu": {"acc,none": 8.0}}


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_benchmarks_need_no_data(tuning, arm_settings, benchmarks, tiny_llama, tmp_path):
    """Of the task that the run was tuned on; a run of a classifier is no language model."""
    data = [{"instruction": f"say {i}", "output": "so"} for i in range(100)]
    (tmp_path / "alpaca.json").write_text(json.dumps(data))
    cut = {"model": str(tiny_llama), "experts": 8, "top_k": 4, "layers": "2:4", "tuning": tuning}
    settings = {**cut, "max_steps": 2, "eval_steps": 2}
    finetune(arm_settings(**settings, task=str(tmp_path / "alpaca.json")))
    finetune(arm_settings(**settings, output=str(tmp_path / "classifier")))
    (tmp_path / "alpaca.json").unlink()
    report = evaluate(EvalConfig(model=str(tmp_path / "out" / "seed-0"), **benchmarks))
    assert report["lm_eval"] == {"mmlu": {"acc,none": 4.0}}
    with pytest.raises(UserError, match=r"--lm-eval: .* is no causal language model"):
        evaluate(EvalConfig(model=str(tmp_path / "classifier" / "seed-0"), **benchmarks))


def test_a_tuned_model_exported_as_dense_is_its_dense_reading(arm_settings, task_file, tmp_path):
    (record,) = finetune(arm_settings(max_steps=8, learning_rate=3e-3))
    exported = emoe.export(tmp_path / "out" / "seed-0" / "model", tmp_path / "dense")
    assert (exported["layers"], exported["identical"]) == (2, 0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert type(model) is transformers.LlamaForSequenceClassification
    given = {"model": str(tmp_path / "dense"), "task": str(task_file), "domains": "own,far"}
    report = evaluate(EvalConfig(**given, output=str(tmp_path / "scores")))
    for name, facts in report["sets"].items():
        assert facts == record["readings"]["dense"][name]
        ours = lines(tmp_path / "out" / "seed-0" / "predictions" / "dense" / f"{name}.jsonl")
        theirs = lines(tmp_path / "scores" / "predictions" / "as-trained" / f"{name}.jsonl")
        assert [r["id"] for r in ours] == [r["id"] for r in theirs]
        torch.testing.assert_close(*(torch.tensor([r["scores"] for r in rows]) for rows in (ours, theirs)))
    with pytest.raises(UserError, match="only as-trained fits"):
        evaluate(EvalConfig(**given, read_as="dense"))
    finetune(arm_settings(method="gmoe", max_steps=2, eval_steps=2, output=str(tmp_path / "copies")))
    with pytest.raises(UserError, match="copies of whole FFNs"):
        emoe.export(tmp_path / "copies" / "seed-0" / "model", tmp_path / "no")
