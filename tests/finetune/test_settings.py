"""`emoe finetune` before it trains: settings, tasks, outputs and texts that do not fit, and what a folder holds."""

from __future__ import annotations

import json

import pytest
from support.labelled import sentences, write_csv, write_task
from support.modules import moduleformer

from emoe.cli.main import main
from emoe.errors import UserError
from emoe.finetuning.evaluate import evaluate
from emoe.finetuning.settings import EvalConfig, FinetuneConfig, located
from emoe.finetuning.tune import finetune


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"task": "sentimnt"}, "--task: unknown task 'sentimnt' (did you mean 'sentiment'?)"),
        ({"method": "moe"}, "--method: unknown method 'moe'"),
        ({"seeds": "0,zero"}, "--seeds: '0,zero' is no list"),
        ({"model": "nowhere/at/all"}, "--model: nowhere/at/all does not exist"),
        ({"domains": "moon"}, "--domains: task 'neurons' has no domain 'moon'"),
        ({"top_k": 9}, "--top-k: 9 is more than the model's 8 experts"),
        ({"mi_weight": 0.1}, "--mi-weight: method 'emoe' has no trained gate"),
        ({"loss": ["mi=0.1"]}, "--loss: method 'emoe' has no trained gate"),
        ({"loss": ["mi=0.1"], "train": "new-experts"}, "--loss: no gate trains with --train new-experts; drop one"),
        ({"loss": ["mi=0.1"], "mi_weight": 0.1, "train": "router"}, "--loss: mi has a --mi-weight as well"),
        ({"method": "emoe-learn", "loss": ["mi=-1"]}, "--loss: 'mi=-1' is not mi=FACTOR with a factor above 0"),
        ({"method": "emoe-learn", "loss": ["z=1"], "z_weight": 0.1}, "--loss: z has a --z-weight as well"),
        ({"experts": 16}, "--experts: the model is cut into experts already"),
        ({"gate": "discriminant"}, "--gate: the model is cut into experts already"),
        ({"seeds": "0:1000000000000000000000"}, "at most 1000 seeds"),
        ({"seeds": "4294967296"}, "each from 0 to 4294967295"),
        ({"learning_rate": 1e30, "max_grad_norm": 0}, "lower --learning-rate"),
        (
            {"model": "DENSE", "gate": "discriminant"},
            "--gate discriminant, --split weights: the training texts are too few",
        ),
        ({"output": ""}, "--output: missing"),
        ({"task": "x.json", "tuning": "head"}, "--tuning head: a language model has no head"),
    ],
)
def test_bad_input(changes, complaint, arm_settings, tiny_llama, tmp_path, capsys):
    changes = {k: str(tiny_llama) if v == "DENSE" else v for k, v in changes.items()}
    changes |= {"experts": 8} if changes.get("model") == str(tiny_llama) else {}
    values = arm_settings(**changes).model_dump(exclude_defaults=True)
    each = [(key, one) for key, value in values.items() for one in (value if isinstance(value, list) else [value])]
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in each]
    assert main(["finetune", "--quiet", *flags]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists() or "learning_rate" in changes  # which is too large in training alone


@pytest.mark.parametrize("there", [False, True])
def test_a_moduleformer_is_told_what_to_do(there, arm_settings, tmp_path):
    """And nothing is left, but for an empty folder that was there."""
    model, output = moduleformer(tmp_path / "model", "mlp"), tmp_path / "runs" / "one"
    if there:
        output.mkdir(parents=True)
    with pytest.raises(UserError, match=r"a ModuleFormer is born with experts.* plain text with `emoe tune`"):
        finetune(arm_settings(model=str(model), output=str(output), seeds="0,1"))
    left = {path for path in tmp_path.rglob("*") if not path.is_relative_to(model)}
    assert left == ({output.parent, output} if there else set())


def test_a_link_to_nowhere_is_no_output(arm_settings, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"--output: .*out is a file; choose another name"):
        finetune(arm_settings())


@pytest.mark.parametrize(
    ("changes", "rows", "complaint"),
    [
        ({"far.csv}": "far.csv, text: txt}"}, None, "far.csv has no column 'txt' (did you mean 'text'?)"),
        ({"'yes'": "'ja'"}, None, "label 'yes' does not belong to this task; known labels: no, ja"),
        ({"role: ood": "role: id"}, None, "2 domains have the role 'id'"),
        ({"far.csv": "fern.csv"}, None, "fern.csv does not exist"),
        ({"name:": "nmae:"}, None, "task.yaml"),
        ({}, [("all of them", "yes"), ("the same", "yes")], "every training example is 'yes'"),
        ({}, [], "the training set of task 'neurons' is empty"),
    ],
)
def test_bad_tasks(changes, rows, complaint, arm_settings, tmp_path):
    path = write_task(tmp_path / "bad", **changes)
    if rows is not None:
        write_csv(tmp_path / "bad" / "train.csv", rows)
    with pytest.raises(UserError) as caught:
        finetune(arm_settings(task=str(path)))
    assert complaint in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_settings_younger_than_a_run_have_their_default_in_it(arm_settings, tmp_path):
    finetune(arm_settings(max_steps=2))
    path = tmp_path / "out" / "seed-0" / "run.json"
    facts = json.loads(path.read_text())
    for key in ("loss", "group_by_length"):  # as a version wrote it that did not know them
        del facts["settings"][key]
    path.write_text(json.dumps(facts))
    assert len(finetune(arm_settings(max_steps=2, seeds="0,1", resume=True))) == 2
    with pytest.raises(UserError, match=r"other settings \(group_by_length: False, now True\); .* or --overwrite$"):
        finetune(arm_settings(max_steps=2, seeds="0:3", resume=True, group_by_length=True))
    path.write_text("{")
    with pytest.raises(UserError, match=r"--output: .*run.json is not valid JSON"):
        finetune(arm_settings(max_steps=2, seeds="2", resume=True))


def test_seeds_of_one_folder_have_the_same_texts(arm_settings, tmp_path):
    """The paths are the same; a file has been edited since."""
    task = write_task(tmp_path / "task")
    quick = {"task": str(task), "max_steps": 2, "eval_steps": 2, "resume": True}
    (record,) = finetune(arm_settings(**quick))
    assert set(record["data"]["sets"]) == {"own-validation", "own", "far"}
    write_csv(tmp_path / "task" / "far.csv", [*sentences(20, 9), *sentences(96, 1)[:3]])  # training loses the same 3
    with pytest.raises(UserError, match=r"--resume: .*seed-0 was made with other data: the texts of far have changed"):
        finetune(arm_settings(**quick, seeds="0,1"))
    write_csv(tmp_path / "task" / "train.csv", sentences(50, 8))
    with pytest.raises(UserError, match=r"--output: .*: the texts of training, far have .*use another --output$"):
        finetune(arm_settings(**quick, seeds="1"))
    path = tmp_path / "out" / "seed-0" / "run.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "data"}))
    (added,) = finetune(arm_settings(**quick, seeds="1"))  # a record without digests is of an older version
    assert added["data"] != record["data"]


def test_a_run_is_the_same_from_every_folder(arm_settings, experts, tmp_path, monkeypatch):
    """Paths were given as seen from the folder of the call."""
    task = write_task(tmp_path / "task")
    monkeypatch.chdir(task.parent)
    (record,) = finetune(arm_settings(task="task.yaml", max_steps=2))
    assert (record["settings"]["task"], record["settings"]["model"]) == (str(task), str(experts))
    path = tmp_path / "out" / "seed-0" / "run.json"
    record["settings"]["task"] = "task.yaml"  # as a version wrote it that took paths as they were given
    path.write_text(json.dumps(record))
    assert len(finetune(arm_settings(task="task.yaml", max_steps=2, seeds="0,1", resume=True))) == 2
    monkeypatch.chdir(tmp_path)
    report = evaluate(EvalConfig(model="out/seed-1", domains="far"))
    assert report["sets"]["far"]["examples"] == 27
    with pytest.raises(UserError, match=r"made with other settings \(task: "):
        finetune(arm_settings(task=str(write_task(tmp_path / "task.d")), max_steps=2, seeds="2"))


def test_only_paths_are_located(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sentiment").mkdir()  # a folder called like a task is none
    names = {"task": "sentiment", "model": "bert-base", "data_dir": None, "seed": 1}
    assert located(names) == names
    (tmp_path / "bert-base").mkdir()
    (tmp_path / "bert-base" / "config.json").write_text("{}")  # a folder with a model goes before an alias
    assert located({"model": "bert-base", "data_dir": "d"}) == {
        "model": str(tmp_path / "bert-base"),
        "data_dir": str(tmp_path / "d"),
    }


def test_settings_without_effect_are_named(arm_settings):
    said = []
    finetune(arm_settings(max_steps=2, epochs=2.0, lora_r=4, copies=8), say=said.append)
    assert said[:3] == [
        "--epochs has no effect with --max-steps",
        "--lora-r has no effect with --tuning full",
        "--copies has no effect with --method emoe",
    ]


def test_one_process_has_nobody_to_share_weights_with(arm_settings, tmp_path):
    with pytest.raises(UserError, match=r"--fsdp: .* accelerate launch --num_processes 2 -m emoe finetune"):
        finetune(arm_settings(fsdp=True))
    assert not (tmp_path / "out").exists()


def test_settings_know_their_seeds():
    assert FinetuneConfig(seeds="0:5").seed_list() == [0, 1, 2, 3, 4]
    assert FinetuneConfig(seeds="7, 2").seed_list() == [7, 2]
    for bad in ("", "1,1", "-1", "a:b", "5:2"):
        with pytest.raises(UserError):
            FinetuneConfig(seeds=bad).seed_list()
