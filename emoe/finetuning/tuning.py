"""What is trained: everything, LoRA's matrices (Hu et al. 2021, arXiv 2106.09685, through peft), or the head alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from emoe.errors import UserError
from emoe.finetuning.arms import Arm
from emoe.finetuning.model import Start, attention_linears
from emoe.finetuning.settings import FinetuneConfig
from emoe.surgery.modules import anatomy_of
from emoe.surgery.training import Frozen, check_choice, train_only
from emoe.tasks.spec import Task


def check_tuning(config: FinetuneConfig, arm: Arm, task: Task) -> None:
    """Raise `UserError` for a combination that trains nothing sensible or needs a library that is not there."""
    if arm.copied and config.tuning != "full":
        raise UserError("--method gmoe: its copies of the FFN must be trained; use --tuning full")
    if config.tuning == "head" and task.kind == "instructions":
        raise UserError("--tuning head: a language model has no head of its own to train; use full or lora")
    if config.tuning == "lora" and importlib.util.find_spec("peft") is None:
        raise UserError("--tuning lora: needs the package peft; pip install peft")
    if config.train != "all":
        if config.tuning != "full" or not arm.sparse or arm.copied:
            raise UserError(f"--train {config.train}: needs --tuning full and a method with experts, such as emoe")
        if config.weight_decay:
            raise UserError(f"--weight-decay: --train {config.train} must leave the rest as it is; use 0")
    elif config.losses() and not arm.learns_gate:
        raise UserError(
            f"{_flag(next(iter(config.losses())))}: method '{arm.name}' has no trained gate for this loss to act on; "
            "use emoe-learn or gmoe"
        )


def _flag(loss: str) -> str:
    return f"--{loss}-weight"


def choose_parameters(config: FinetuneConfig, arm: Arm, start: Start, seed: int) -> nn.Module:
    """The model to train, with ``requires_grad`` set; a trained gate and the head are trained in every tuning."""
    model = start.model
    if config.tuning == "full":
        return model
    gates = [name for name, _ in model.named_modules() if name.endswith(".router.cosine")]
    if config.tuning == "head":
        model.requires_grad_(False)
        for name in (*start.head, *gates):
            model.get_submodule(name).requires_grad_(True)
        return model
    from peft import LoraConfig, get_peft_model

    targets = attention_linears(model, config.lora_target == "attention+ffn")
    torch.manual_seed(seed)  # peft draws from the global generator: the same matrices in every arm
    return get_peft_model(
        model,
        LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in targets),
            modules_to_save=[*start.head, *gates] or None,
        ),
    )


def freeze(config: FinetuneConfig, start: Start, base: Path) -> Frozen | None:
    """Set what ``--train`` says; None if that is everything. The head of the task, which is new, trains in any case.

    Raises:
        UserError: a loss or a training of gates that choose nothing.
    """
    for loss in config.losses():
        check_choice(start.model, _flag(loss))
    if config.train == "all":
        return None
    head = [p for name in start.head for p in start.model.get_submodule(name).parameters()]
    return train_only(start.model, anatomy_of(base), config.train, also=head)


def trainable(model: nn.Module) -> int:
    """Number of parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
