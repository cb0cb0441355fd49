"""What an interrupted training goes on from."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from emoe.finetuning.states import states, train_from


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, y):
        return {"loss": ((self.weight * x - y) ** 2).mean()}


def trainer(folder, **settings) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        save_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    rows = [{"x": torch.tensor([1.0]), "y": torch.tensor([float(n)])} for n in range(64)]
    return Trainer(model=Line(), args=arguments, train_dataset=rows)


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


def test_half_of_a_state_is_none(tmp_path):
    trainer(tmp_path).train()
    last = tmp_path / "checkpoint-4" / "trainer_state.json"
    last.write_text(last.read_text()[:100])
    assert [path.name for path in states(tmp_path)] == ["checkpoint-2"]
