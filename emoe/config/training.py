"""Settings of training on plain text: `emoe recover`, `emoe tune` and `emoe pretrain`."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from emoe.config.base import CORPUS_NAMES, SEEDS, Settings, setting
from emoe.errors import UserError, nearest


class RecoverConfig(Settings):
    """Settings of a light recovery: training a converted model to say what the dense one says."""

    model: str = setting("", "Folder of a converted checkpoint.")
    output: str = setting("", "Folder to write; must not exist unless --overwrite or --resume is given.")
    teacher: str | None = setting(None, "Dense teacher: a folder or alias; default: the model itself, all experts on.")
    text: list[str] = setting(
        ["builtin"], "Plain text to train on, such as corpus:essays; as for `emoe convert --calibration`."
    )
    budgets: list[float] = setting(
        [], "Shares of experts to train for, one drawn for each step; default: the model's own."
    )
    loss: Literal["kl", "hidden"] = setting(
        "kl", "What is compared with the teacher: kl (its predictions) or hidden (the last hidden states)."
    )
    gates: Literal["fixed", "learned", "softmax"] = setting(
        "fixed",
        "Whether the gates are trained, too: fixed, learned (the tables that they have) or softmax (in their "
        "place linear gates whose softmax weighs the experts, as stock mixtures-of-experts have them).",
    )
    train: Literal["all", "ffn"] = setting("all", "What is trained: every weight, or those of converted FFNs.")
    steps: int = setting(300, "Optimizer steps.", ge=1)
    minutes: float | None = setting(None, "Stop after so many minutes, if --steps takes longer.", gt=0)
    tokens_per_step: int = setting(2048, "Tokens an optimizer step.", ge=1)
    sequence_length: int = setting(512, "Tokens a block of text.", ge=8)
    batch_sequences: int = setting(4, "Sequences a forward call; the rest of a step accumulates.", ge=1)
    learning_rate: float = setting(1e-4, "Peak of AdamW's learning rate; a cosine follows 5% of warm-up.", gt=0)
    held_out_tokens: int = setting(4096, "Tokens of the same text kept apart to measure quality.", ge=1)
    held_out: list[str] = setting([], "Text of other domains to measure on as well; as for --text.")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Matrix products in training; auto: bfloat16 where this processor multiplies that faster."
    )
    checkpoint_steps: int = setting(100, "Optimizer steps between two states that --resume can start from.", ge=1)
    seed: int = setting(0, "Seed of everything random.", **SEEDS)
    resume: bool = setting(False, "Go on with an interrupted recovery of the same settings.")
    overwrite: bool = setting(False, "Replace an existing output folder, once the new one is complete.")


class TuneConfig(Settings):
    """Settings of training a model further on plain text."""

    model: str = setting("", "Folder of a causal language model, with experts or without.")
    output: str = setting("", "Folder to write; must not exist unless --overwrite or --resume is given.")
    text: list[str] = setting(
        ["builtin"], "Plain text to train on, such as corpus:essays; as for `emoe convert --calibration`."
    )
    train: Literal["all", "router", "new-modules", "new-experts", "lora"] = setting(
        "all",
        "What is trained: every weight, the gates, what the last `emoe extend` added (all else stays bit for bit), the "
        "same without its gate rows, or LoRA's matrices on every linear and expert, merged at the end.",
    )
    lora_rank: int = setting(8, "Rank of LoRA's matrices.", ge=1)
    loss: list[str] = setting(
        [],
        "Losses on routers beside the next token's: concentration=X (few modules), mi=X, router=X (holds new or "
        "all gate rows back).",
    )
    top_k: int | None = setting(None, "Experts a token uses meanwhile; default: the model's own.", ge=1)
    steps: int = setting(300, "Optimizer steps.", ge=1)
    minutes: float | None = setting(None, "Stop after so many minutes, if --steps takes longer.", gt=0)
    tokens_per_step: int = setting(2048, "Tokens an optimizer step.", ge=1)
    sequence_length: int = setting(512, "Tokens a block of text.", ge=8)
    batch_sequences: int = setting(4, "Sequences a forward call; the rest of a step accumulates.", ge=1)
    learning_rate: float = setting(1e-4, "Peak of AdamW's learning rate; a cosine follows 5% of warm-up.", gt=0)
    held_out_tokens: int = setting(4096, "Tokens of the same text kept apart to measure quality.", ge=1)
    held_out: list[str] = setting([], "Text of other domains to measure on as well; as for --text.")
    evaluate_steps: int | None = setting(None, "Optimizer steps between two measurements on the way.", ge=1)
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Matrix products in training; auto: bfloat16 where this processor multiplies that faster."
    )
    checkpoint_steps: int = setting(100, "Optimizer steps between two states that --resume can start from.", ge=1)
    seed: int = setting(0, "Seed of everything random.", **SEEDS)
    resume: bool = setting(False, "Go on with an interrupted training of the same settings.")
    overwrite: bool = setting(False, "Replace an existing output folder, once the new one is complete.")


class PretrainConfig(Settings):
    """Settings of pre-training: a new model on plain text of several domains."""

    output: str = setting("", "Folder to write; must not exist unless --overwrite or --resume is given.")
    corpus: list[str] = setting(
        [],
        f"Text of one domain: a built-in corpus ({', '.join(CORPUS_NAMES)}), or name=path for a file, a folder or a "
        "dataset; give several.",
    )
    mix: Literal["equal", "size"] = setting("equal", "How often domains are drawn: equally, or by their size.")
    corpus_tokens: int | None = setting(None, "Most tokens read of each domain; default: all.", ge=1)
    tokenizer: str = setting("train", "A model's name or folder whose tokenizer to take, or 'train' for a new one.")
    vocabulary: int = setting(8192, "Tokens of a trained tokenizer (byte-level BPE).", ge=257)
    architecture: dict[str, Any] = setting({}, "model_type and fields of its transformers configuration.")
    sequence_length: int = setting(512, "Tokens a sequence; documents are packed end to end.", ge=8)
    tokens_per_step: int = setting(4096, "Tokens an optimizer step, all processes together.", ge=1)
    batch_sequences: int = setting(4, "Sequences a forward call; the rest of a step accumulates.", ge=1)
    steps: int = setting(1000, "Optimizer steps.", ge=1)
    minutes: float | None = setting(None, "Stop after so many minutes, if --steps takes longer.", gt=0)
    learning_rate: float = setting(1e-3, "Peak of AdamW's learning rate; a cosine follows 5% of warm-up.", gt=0)
    weight_decay: float = setting(0.1, "AdamW's decay of matrices.", ge=0)
    gradient_checkpointing: bool = setting(False, "Recompute layers in the backward pass, for less memory.")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "Matrix products; auto: bfloat16 where this processor multiplies that faster."
    )
    held_out_share: float = setting(0.05, "Share of each domain's text kept apart.", gt=0, lt=1)
    held_out_tokens: int = setting(16384, "Tokens of it that a domain is measured on.", ge=1)
    evaluate_steps: int = setting(250, "Optimizer steps between two evaluations.", ge=1)
    log_steps: int = setting(25, "Optimizer steps between two lines of the log.", ge=1)
    checkpoint_steps: int = setting(250, "Optimizer steps between two states that --resume can start from.", ge=1)
    seed: int = setting(0, "Seed of everything random.", **SEEDS)
    resume: bool = setting(False, "Go on with an interrupted training of the same settings.")
    overwrite: bool = setting(False, "Replace an existing output folder, once the new one is complete.")


def loss_factors(given: list[str], known: Collection[str]) -> dict[str, float]:
    """``["concentration=0.001"]`` → ``{"concentration": 0.001}``.

    Raises:
        UserError: an unknown name, one that is there twice, or a factor that is no number above 0.
    """
    found: dict[str, float] = {}
    for item in given:
        name, equals, factor = item.partition("=")
        if name not in known:
            raise UserError(f"--loss: unknown loss '{name}'{nearest(name, known)}. Known: {', '.join(known)}")
        if name in found:
            raise UserError(f"--loss: {name} is given twice; give one factor")
        try:
            found[name] = float(factor)
        except ValueError:
            found[name] = 0.0
        if not equals or not 0 < found[name] < float("inf"):
            raise UserError(f"--loss: '{item}' is not {name}=FACTOR with a factor above 0, such as {name}=0.001")
    return found
