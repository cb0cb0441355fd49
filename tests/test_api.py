"""The verbs from Python."""

from __future__ import annotations

import pytest
from support.labelled import write_task
from support.tiny import TEXT

import emoe
from emoe.errors import UserError

LITTLE = {"sequence_length": 32, "batch_sequences": 2}


@pytest.fixture(scope="module")
def experts(tiny_llama, tmp_path_factory):
    output = tmp_path_factory.mktemp("api") / "experts"
    emoe.convert(
        tiny_llama, experts=8, output=output, layers="2:4", held_out_tokens=0, split="weights", gate="average-key"
    )
    return output


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 8)
    return str(path)


def test_fine_tune_score_and_compare(experts, tmp_path):
    task = write_task(tmp_path / "task")
    little = {"max_steps": 2, "batch_size": 8, "seeds": "0,1", "top_k": 4}
    for method in ("vanilla", "emoe"):
        records = emoe.finetune(experts, task, tmp_path / method, method=method, **little)
        assert [record["seed"] for record in records] == [0, 1]
    found = emoe.compare([tmp_path / "vanilla", tmp_path / "emoe"], resamples=200)
    assert found.baseline == "vanilla"
    assert "| vanilla |" in str(found)
    scores = emoe.evaluate(tmp_path / "emoe" / "seed-1")["sets"]
    assert scores["own"] == records[1]["readings"]["as-trained"]["own"]


def test_extend_tune_prune_and_look_inside(experts, text, tmp_path):
    emoe.extend(experts, tmp_path / "bigger", experts=2)
    tuned = emoe.tune(
        tmp_path / "bigger",
        tmp_path / "tuned",
        text=text,
        train="new-modules",
        steps=1,
        tokens_per_step=64,
        held_out_tokens=64,
        **LITTLE,
    )
    assert tuned["steps"] == 1
    emoe.prune(tmp_path / "tuned", tmp_path / "pruned", remove="added")
    report = emoe.analyze(
        tmp_path / "pruned", {"one": text, "two": text}, tmp_path / "usage", tokens=64, knock_out=0, **LITTLE
    )
    assert (tmp_path / "usage" / "index.html").is_file()
    assert set(report["domains"]) == {"one", "two"}


def test_a_misspelt_setting_names_the_nearest(experts, tmp_path):
    with pytest.raises(UserError, match=r"--kep: there is no such setting \(did you mean 'keep'\?\)"):
        emoe.prune(experts, tmp_path / "out", kep=0.5)
    with pytest.raises(UserError, match=r"--expertz: .*'experts'"):
        emoe.convert(experts, output=tmp_path / "out", expertz="8")


def test_every_verb_that_makes_something_is_a_function():
    verbs = "convert export finetune evaluate compare recover tune analyze prune extend pretrain"
    for verb in verbs.split():
        assert callable(getattr(emoe, verb)), verb
