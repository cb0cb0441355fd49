"""What all trainings share: the precision, and that nothing which is no number is kept."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file
from support.drill import contents
from transformers import Trainer

from emoe.cli.main import main
from emoe.errors import UserError
from emoe.finetuning import loop
from emoe.finetuning.base import trains_in_bfloat16
from emoe.tasks.metrics import perplexity


@pytest.mark.parametrize(
    ("native", "emulated", "precision", "half"),
    [
        (True, True, "auto", True),
        (False, True, "auto", False),  # what is emulated is slower than float32
        (False, False, "auto", False),
        (False, True, "bfloat16", True),
        (True, True, "float32", False),
    ],
)
def test_old_gpus_train_in_float32(native, emulated, precision, half, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    known = lambda including_emulation=True: native or (including_emulation and emulated)  # noqa: E731
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", known)
    assert trains_in_bfloat16(precision) == half


def test_bfloat16_on_a_gpu_that_does_not_know_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    with pytest.raises(UserError, match="--precision bfloat16: this GPU does not know it"):
        trains_in_bfloat16("bfloat16")


def test_perplexity_of_no_number_is_none():
    assert perplexity(2.0, 2) == pytest.approx(2.718281828)
    assert perplexity(1e9, 1) == perplexity(float("inf"), 1) < float("inf")
    assert perplexity(float("nan"), 1) != perplexity(float("nan"), 1)


@pytest.fixture(params=["tune", "recover"])
def flags(request, converted_llama, text_file, tmp_path):
    return [
        *(request.param, "--model", str(converted_llama), "--output", str(tmp_path / "out"), "--text", str(text_file)),
        *("--tokens-per-step", "128", "--sequence-length", "64", "--held-out-tokens", "128", "--steps", "6"),
        *("--checkpoint-steps", "4", "--precision", "float32", "--quiet"),
    ]


@pytest.mark.parametrize(
    ("rate", "steps", "what"),
    [
        ("1e30", "4", "(loss|gradient's norm) is"),  # shows in the third step, before the first line of the log
        ("1e39", "2", "largest weight is"),  # beyond fp32, in the last step
    ],
)
def test_a_diverged_model_is_not_published(rate, steps, what, flags, tmp_path, capsys):
    assert main([*flags, "--learning-rate", rate, "--steps", steps]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(f"the {what} .*: lower --learning-rate and add --overwrite", error)
    assert [path.name for path in tmp_path.iterdir()] == []


def test_nor_is_one_that_answers_with_no_number(flags, tmp_path, monkeypatch, capsys):
    """Its weights finite, but not their products."""
    end = loop.Watch.on_train_end

    def stretch(self, args, state, control, model=None, **others):
        end(self, args, state, control, **others)
        for name, weight in model.named_parameters():
            if "q_proj" in name:
                weight.data.fill_(3e38)

    monkeypatch.setattr(loop.Watch, "on_train_end", stretch)
    assert main([*flags, "--steps", "1"]) == 2
    error = capsys.readouterr().err
    assert "the perplexity of training domain is nan after training: lower --learning-rate" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_the_last_good_state_and_the_earlier_output_stay(what, flags, tmp_path, monkeypatch, capsys):
    """Spoilt in the last step, of which a state would be saved, too."""
    assert main([*flags, "--steps", "1"]) == 0
    before = contents(tmp_path / "out")
    step, end = Trainer.training_step, loop.Watch.on_step_end

    def spoil_loss(self, *arguments):
        loss = step(self, *arguments)
        return loss * float("nan") if self.state.global_step == 5 else loss

    def spoil_weight(self, args, state, control, model=None, **others):
        end(self, args, state, control, **others)
        if state.global_step == 6:
            next(model.parameters()).data.view(-1)[0] = float("nan")

    if what == "loss":
        monkeypatch.setattr(Trainer, "training_step", spoil_loss)
    else:
        monkeypatch.setattr(loop.Watch, "on_step_end", spoil_weight)
    assert main([*flags, "--overwrite"]) == 2
    state = tmp_path / ".out.emoe-state" / "training" / "checkpoint-4"
    error = capsys.readouterr().err
    assert f"{what} is nan in step 6: lower --learning-rate" in error
    assert f"the last good checkpoint is {state}" in error
    kept = load_file(state / "model.safetensors").items()
    assert all(torch.isfinite(weight).all() for name, weight in kept if not name.endswith("router.threshold"))
    assert contents(tmp_path / "out") == before
