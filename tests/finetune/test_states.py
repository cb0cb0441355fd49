"""What an interrupted training goes on from."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from emoe.errors import UserError
from emoe.finetuning.base import BaseTrainer, shared_arguments
from emoe.finetuning.states import states, train_from


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, y):
        return {"loss": ((self.weight * x - y) ** 2).mean()}


def trainer(folder, kind=Trainer, **settings) -> Trainer:
    given = {"max_steps": 4, "use_cpu": True, "report_to": "none", "disable_tqdm": True} | settings
    arguments = TrainingArguments(
        output_dir=str(folder), learning_rate=0.1, lr_scheduler_type="constant", save_steps=2, **given
    )
    rows = [{"x": torch.tensor([1.0]), "y": torch.tensor([float(n)])} for n in range(64)]
    return kind(model=Line(), args=arguments, train_dataset=rows, eval_dataset=rows[:1])


@pytest.mark.parametrize("number", [0, 1])
def test_going_on_makes_the_steps_that_are_left_and_no_more(number, tmp_path):
    """Killed half-way, or behind the last step but before the result was written."""
    whole = trainer(tmp_path)
    train_from(whole, None)
    again = trainer(tmp_path)
    train_from(again, states(tmp_path)[number])
    assert again.state.global_step == 4
    assert torch.equal(again.model.weight, whole.model.weight)


def test_the_trainer_itself_would_make_one_more(tmp_path):
    """When this fails, `train_from` is no longer needed."""
    trainer(tmp_path).train()
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=str(states(tmp_path)[-1]))
    assert again.state.global_step == 5


def test_a_state_that_patience_made_the_last_is_not_gone_on_from(tmp_path):
    """Killed behind an early stop."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    whole = trainer(tmp_path)
    whole.add_callback(Stop())
    train_from(whole, None)
    again = trainer(tmp_path)
    train_from(again, states(tmp_path)[-1])
    assert (whole.state.global_step, again.state.global_step) == (2, 2)
    assert torch.equal(again.model.weight, whole.model.weight)


BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "label_names": ["y"]}
"""The weight moves away from what it is measured on, so that the first state is the best."""


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """States of a training in a folder that was named relatively, killed before its best state was loaded."""

    def cut(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(Trainer, "_load_best_model", cut)
        with pytest.raises(KeyboardInterrupt):
            train_from(trainer("run", **BEST), None)
    return states(tmp_path / "run")


def test_the_best_state_is_found_from_another_folder(killed, tmp_path):
    whole = trainer(tmp_path / "whole", **BEST)
    train_from(whole, None)
    first, last = killed
    again = trainer(tmp_path / "run", **BEST)
    train_from(again, last)
    assert torch.equal(again.model.weight, whole.model.weight)
    assert again.state.best_model_checkpoint == str(first)


def test_and_by_a_training_that_goes_on(killed, tmp_path):
    """From its first step, not only once the Trainer has saved a further state."""
    seen = []

    class See(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(state.best_model_checkpoint)

    first, last = killed
    facts = json.loads((last / "trainer_state.json").read_text())
    assert facts["best_model_checkpoint"] == "run/checkpoint-2"
    facts["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"] = False
    (last / "trainer_state.json").write_text(json.dumps(facts | {"max_steps": 5}))
    again = trainer(tmp_path / "run", **BEST | {"max_steps": 5})
    again.add_callback(See())
    train_from(again, last)
    assert again.state.global_step == 5
    assert seen == [str(first)]


def test_a_best_state_that_is_gone_is_told(killed, tmp_path):
    first, last = killed
    shutil.rmtree(first)
    with pytest.raises(UserError, match=r"--resume: .*checkpoint-2, the best state so far, is gone"):
        train_from(trainer(tmp_path / "run", **BEST), last)


def test_half_of_a_state_is_none(tmp_path):
    trainer(tmp_path).train()
    last = tmp_path / "checkpoint-4" / "trainer_state.json"
    last.write_text(last.read_text()[:100])
    assert [path.name for path in states(tmp_path)] == ["checkpoint-2"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_nor_is_one_whose_removal_was_cut_short(name, tmp_path):
    """By a version that let the Trainer remove states."""
    trainer(tmp_path).train()
    (tmp_path / "checkpoint-4" / name).unlink()
    assert [path.name for path in states(tmp_path)] == ["checkpoint-2"]


@pytest.mark.parametrize("best", [True, False])
def test_a_kill_while_a_state_is_removed_leaves_whole_ones(best, tmp_path, killed_in_removing):
    """The third has come, and the second goes: the best is the first. Or the second has come, and the first goes."""
    settings = {"max_steps": 6} | shared_arguments("float32") | (BEST if best else {})
    with killed_in_removing():
        train_from(trainer(tmp_path, BaseTrainer, **settings), None)
    found = [path.name for path in states(tmp_path)]
    assert found == (["checkpoint-2", "checkpoint-6"] if best else ["checkpoint-4"])
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == set(found)


def test_the_last_state_stays_until_the_result_is_written(tmp_path):
    """Beside the best: what comes behind the last step may be killed, too."""
    train_from(trainer(tmp_path, BaseTrainer, **BEST | shared_arguments("float32")), None)
    assert [path.name for path in states(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
