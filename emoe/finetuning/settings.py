"""Settings of `emoe finetune` and `emoe eval`, as `emoe.config` has those of the other commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from emoe.config import SEEDS, Settings, loss_factors, setting
from emoe.errors import UserError

SEED_LIMIT = 1000
"""Most seeds in one call; more is a typing error."""

MAX_LENGTH = 128
"""Tokens of an example, where nothing else is said."""


def names_of(text: str | None) -> list[str] | None:
    """What stands between commas; None where nothing was said."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


class FinetuneConfig(Settings):
    """Settings of a fine-tuning: one arm, some seeds."""

    model: str = setting(
        "", "Dense model (alias, folder, .gguf, hub id), cut into experts first; or a converted folder."
    )
    output: str = setting("", "Folder to write: OUTPUT/seed-S for each seed.")
    task: str = setting(
        "", "Name of a task, a .yaml file of your own, or a .json/.jsonl file of instructions (Alpaca)."
    )
    method: str = setting(
        "emoe", "Arm: vanilla, dropout, emoe, emoe-learn, gmoe, random or bottom-k (docs/finetuning.md)."
    )
    tuning: Literal["full", "lora", "head"] = setting("full", "What is trained: full, lora, or head (all else frozen).")
    train: Literal["all", "router", "new-modules", "new-experts"] = setting(
        "all",
        "With --tuning full, beside the head: all, the gates, or what the last `emoe extend` added, with its gate rows "
        "(new-modules) or without (new-experts); all else stays bit for bit.",
    )
    loss: list[str] = setting(
        [],
        "Losses on trained gates, NAME=FACTOR: concentration, mi, switch, z; as --concentration-weight etc.",
    )
    seeds: str = setting("0", "Seeds by commas, or a range such as 0:5. A seed draws head, data order and dropout.")

    domains: str | None = setting(None, "OOD domains to score, by commas. [default: all of the task]")
    data_dir: str | None = setting(None, "Folder DIR/SET/SPLIT.csv (.tsv, .jsonl, .json, .parquet) instead of the hub.")
    train_limit: int | None = setting(None, "Training examples, at most; the same ones for every seed and arm.", ge=2)
    test_limit: int | None = setting(None, "Examples of each set that is scored, at most.", ge=1)
    max_length: int = setting(MAX_LENGTH, "Tokens of an example; what is longer is cut.", ge=4)

    experts: int = setting(64, "E: experts a converted layer, when a dense model is given.", ge=1)
    top_k: int | None = setting(None, "K: experts a token uses. [default: --active times --experts]", ge=1)
    active: float = setting(0.5, "Share of the experts that a token uses.", gt=0, le=1)
    layers: str = setting("-4::2", "Layers to cut into experts; the default is two late ones, as published.")
    split: str = setting("weights", "How neurons are grouped; see `emoe convert`.")
    gate: Literal["average-key", "representative", "discriminant"] = setting(
        "average-key", "Gate of --method emoe: average-key follows the weights, the others stay as fitted on the texts."
    )
    split_seed: int = setting(0, "Seed of the clustering, the same for all --seeds.", **SEEDS)
    copies: int = setting(4, "Copies of the FFN with --method gmoe.", ge=2)
    copies_top_k: int = setting(2, "Copies that a token uses with --method gmoe.", ge=1)

    lora_r: int = setting(8, "Rank of LoRA's matrices.", ge=1)
    lora_alpha: float = setting(16.0, "LoRA's scale, divided by the rank.", gt=0)
    lora_dropout: float = setting(0.1, "Dropout before LoRA's matrices.", ge=0, lt=1)
    lora_target: Literal["attention", "attention+ffn"] = setting("attention", "Linears that get LoRA.")

    learning_rate: float | None = setting(None, "Peak of AdamW. [default: full 3e-5, lora 3e-4, head 1e-3]", gt=0)
    schedule: Literal["linear", "cosine", "constant"] = setting("linear", "Learning rate after the warm-up.")
    warmup: float = setting(0.06, "Share of the steps in which the learning rate rises.", ge=0, lt=1)
    weight_decay: float = setting(0.0, "AdamW's weight decay.", ge=0)
    epochs: float = setting(3.0, "Passes over the training set.", gt=0)
    max_steps: int | None = setting(None, "Optimizer steps, instead of --epochs.", ge=1)
    batch_size: int = setting(32, "Examples a forward call and process.", ge=1)
    group_by_length: bool = setting(
        False, "Put examples of like length into one batch: less padding, less random batches."
    )
    accumulation: int = setting(1, "Forward calls an optimizer step.", ge=1)
    max_grad_norm: float = setting(1.0, "Gradients are clipped to this norm; 0 for no clipping.", ge=0)
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Matrix products (autocast); auto: bfloat16 where this processor multiplies that faster."
    )
    mi_weight: float = setting(0.0, "Weight of the mutual-information loss on trained gates.", ge=0)
    switch_weight: float = setting(0.0, "Weight of the Switch balancing loss on trained gates.", ge=0)
    concentration_weight: float = setting(0.0, "Weight of the load-concentration loss on trained gates.", ge=0)
    z_weight: float = setting(0.0, "Weight of the z-loss on trained gates.", ge=0)

    eval_steps: int | None = setting(None, "Optimizer steps between two validations. [default: once an epoch]", ge=1)
    patience: int | None = setting(None, "Stop after so many validations without a better score.", ge=1)
    log_steps: int = setting(10, "Optimizer steps between two lines of the log.", ge=1)
    tensorboard: bool = setting(False, "Write the log for TensorBoard, too.")
    fsdp: bool = setting(False, "Several processes share the weights (FSDP) instead of each holding all (DDP).")
    discard_model: bool = setting(False, "Keep scores and predictions only, not the trained weights.")
    resume: bool = setting(False, "Go on: finished seeds are skipped, an unfinished one continues.")
    overwrite: bool = setting(False, "Replace the folders of these seeds.")

    def seed_list(self) -> list[int]:
        """Seeds of ``--seeds``; raises `UserError` when that is not of its form."""
        seeds: list[int] = []
        try:
            for part in self.seeds.replace(" ", "").split(","):
                start, colon, stop = part.partition(":")
                seeds += range(int(start or 0), int(stop))[: SEED_LIMIT + 1] if colon else [int(part)]
        except (ValueError, OverflowError):
            seeds = []
        if not seeds or len(set(seeds)) < len(seeds):
            raise UserError(f"--seeds: '{self.seeds}' is no list of different seeds such as 0,1,2 or 0:5")
        if min(seeds) < 0 or max(seeds) >= SEEDS["lt"] or len(seeds) > SEED_LIMIT:
            raise UserError(f"--seeds: '{self.seeds}': at most {SEED_LIMIT} seeds, each from 0 to {SEEDS['lt'] - 1}")
        return seeds

    def rate(self) -> float:
        """Peak learning rate."""
        return self.learning_rate or {"full": 3e-5, "lora": 3e-4, "head": 1e-3}[self.tuning]

    def losses(self) -> dict[str, float]:
        """Auxiliary losses that are switched on, by name, with their weights."""
        names = {"mi": self.mi_weight, "switch": self.switch_weight}
        names |= {"concentration": self.concentration_weight, "z": self.z_weight}
        given = loss_factors(self.loss, names)
        for name in given:
            if names[name]:
                raise UserError(f"--loss: {name} has a --{name}-weight as well; give one of them")
        return {name: weight for name, weight in {**names, **given}.items() if weight}

    def fingerprint(self) -> dict:
        """The settings that a run's result depends on, `located`."""
        leave = {"output", "seeds", "resume", "overwrite", "discard_model", "tensorboard"}
        return located(self.model_dump(exclude=leave))


def located(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run with absolute paths for what are paths here, so that they mean the same in every folder."""
    found = dict(settings)
    for key in {"model", "task", "data_dir"} & settings.keys():
        path = Path(os.path.expanduser(settings[key] or ""))
        is_path = {
            "model": (path / "config.json").is_file() or path.is_file(),
            "task": path.suffix in (".yaml", ".yml", ".json", ".jsonl"),
            "data_dir": True,
        }
        if settings[key] and is_path[key]:
            found[key] = str(path.resolve())
    return found


class EvalConfig(Settings):
    """Settings of an evaluation."""

    model: str = setting(
        "",
        "Folder of a run (OUTPUT/seed-S), or of a model with a classification head (with --lm-eval a language model).",
    )
    task: str = setting("", "Task to score; as for `emoe finetune`. [default: the run's own]")
    domains: str | None = setting(None, "Sets to score, by commas. [default: all but the validation set]")
    data_dir: str | None = setting(None, "As for `emoe finetune`.")
    limit: int | None = setting(None, "Examples of each set, at most.", ge=1)
    read_as: Literal["as-trained", "dense", "emoe"] = setting(
        "as-trained", "How the weights are read: as-trained, dense (all experts), or emoe (the run's --top-k)."
    )
    max_length: int | None = setting(None, "Tokens of an example. [default: the run's own, else 128]", ge=4)
    batch_size: int = setting(64, "Examples a forward call.", ge=1)
    lm_eval: str | None = setting(
        None, "Benchmarks of the lm-eval package, by commas, instead of a task (mmlu,arc_easy)."
    )
    output: str = setting("", "Folder for the scores and raw predictions; must not exist.")
