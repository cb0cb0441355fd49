"""What is trained: everything, LoRA's matrices (Hu et al. 2021, arXiv 2106.09685, through peft), or the head alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from emoe.config import flag_of
from emoe.errors import UserError
from emoe.finetuning.arms import Arm
from emoe.finetuning.model import Start, attention_linears
from emoe.finetuning.settings import FinetuneConfig
from emoe.surgery.modules import anatomy_of
from emoe.surgery.training import Frozen, check_choice, train_only
from emoe.tasks.spec import Task


def check_tuning(config: FinetuneConfig, arm: Arm, task: Task) -> None:
    """Raise `UserError` for a combination that trains nothing sensible or needs a library that is not there."""
    losses = config.losses()
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
        if config.train == "new-experts" and losses:
            raise UserError(f"{_flag(config, next(iter(losses)))}: no gate trains with --train new-experts; drop one")
    elif losses and not arm.learns_gate:
        flag = _flag(config, next(iter(losses)))
        raise UserError(
            f"{flag}: method '{arm.name}' has no trained gate for this loss to act on; use emoe-learn or gmoe"
        )


def _flag(config: FinetuneConfig, loss: str) -> str:
    """The flag that asked for a loss."""
    return f"--{loss}-weight" if getattr(config, f"{loss}_weight") else "--loss"


def ignored(config: FinetuneConfig, arm: Arm) -> list[str]:
    """What was set and has no effect, a line each."""
    idle = {"--max-steps": ("epochs",)} if config.max_steps else {}
    if config.tuning != "lora":
        idle[f"--tuning {config.tuning}"] = ("lora_r", "lora_alpha", "lora_dropout", "lora_target")
    if not arm.copied:
        idle[f"--method {arm.name}"] = ("copies", "copies_top_k")
    given = ((why, key) for why, keys in idle.items() for key in keys if key in config.model_fields_set)
    return [f"{flag_of(key)} has no effect with {why}" for why, key in given]


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
        UserError: a loss on, or a training of, gates that choose nothing; a loss on gates that do not train.
    """
    for loss in config.losses():
        check_choice(start.model, _flag(config, loss))
    if config.train == "all":
        return None
    head = [p for name in start.head for p in start.model.get_submodule(name).parameters()]
    anatomy = anatomy_of(base)
    frozen = train_only(start.model, anatomy, config.train, also=head)
    for loss in config.losses():
        if not any(p.requires_grad for p in anatomy.gate_parameters(start.model)):
            raise UserError(
                f"{_flag(config, loss)}: no gate of this model trains with --train {config.train}, so the loss would "
                "act on nothing; leave it out"
            )
    return frozen


def trainable(model: nn.Module) -> int:
    """Number of parameters that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
