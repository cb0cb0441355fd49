"""Settings of `emoe convert`: one class gives the YAML file, the command's flags and the Python function their fields.

Precedence: defaults, then the preset, then ``--config``, then flags.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emoe.errors import UserError, nearest, shortened
from emoe.plainfiles import read_yaml

DEFAULT_PRESET = "fast"
WHY_DEFAULT_PRESET = "no --preset was given; the best training-free gate, in every layer unless --layers is given"


CORPUS_NAMES = ("fiction", "brown", "essays", "computing", "definitions", "python", "german", "quotes", "french")
"""Built-in corpora, those of `emoe.assets.corpora`, which printing a command's help need not import."""


def setting(default: Any, text: str, **limits: Any) -> Any:
    return Field(default, description=text, **limits)


SEEDS = {"ge": 0, "lt": 2**32}
"""What NumPy's generators take, which `transformers.set_seed` sets, too."""


_OF_ONE_RUN = {
    *("output", "resume", "overwrite", "dry_run", "accept_license", "cache_limit"),
    *("checkpoint_seconds", "checkpoint_steps", "minutes"),
}
"""Settings that say where and how work is done, not what comes out; of training, not when it is to stop early."""


class Settings(BaseModel):
    """Settings of a command. A field's description is its help text in the command line and states its unit."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    def fingerprint(self) -> dict[str, Any]:
        """The settings that the result depends on."""
        return self.model_dump(exclude=_OF_ONE_RUN)


class ConvertConfig(Settings):
    """Settings of a conversion."""

    model: str = setting("", "Dense checkpoint: an alias (see `emoe models`), a folder, a .gguf file or a hub id.")
    revision: str | None = setting(None, "Branch, tag or commit of a hub model.")
    output: str = setting("", "Folder to write; must not exist unless --overwrite or --resume is given.")
    preset: str | None = setting(None, "Settings to start from: 'fast' (all layers) or 'finetune' (the paper's).")

    experts: int = setting(64, "E: experts a layer, equal blocks of neurons.", ge=1)
    top_k: int | None = setting(None, "K: experts a token uses; default: --active times --experts.", ge=1)
    active: float = setting(0.5, "Share of the experts that a token uses, when --top-k is not given.", gt=0, le=1)
    budget: float | None = setting(
        None,
        "Share of the experts used on average, each layer getting what it needs: --active X with "
        "--allocation sensitivity.",
        gt=0,
        le=1,
    )
    allocation: Literal["auto", "uniform", "sensitivity"] = setting(
        "auto",
        "How layers share the budget of experts: uniform, or by measured sensitivity. auto: the latter if text "
        "is read for the gate.",
    )
    routing: Literal["auto", "top-k", "threshold", "energy-share"] = setting(
        "auto",
        "How many experts a token gets: top-k, or as many as pass a threshold (K on average) or reach a share "
        "of predicted energy. auto: threshold if text is read for the gate.",
    )
    shared_experts: int = setting(0, "Experts that every token uses, made of the neurons of most energy.", ge=0)
    compensate: bool = setting(False, "Store and add the mean output of skipped experts, a vector a layer.")
    refit_outputs: bool = setting(
        False,
        "Solve each output matrix anew so that chosen experts make up for skipped ones; trains without gradients, and "
        "the dense model is then no longer inside.",
    )
    layers: str = setting(
        "all", "Layers to convert: 'all', slices and numbers, such as '16:32:4' or '26,28' or '-4::2'."
    )
    split: str = setting("coactivation", "How neurons are grouped: coactivation, graph, weights, random or contiguous.")
    gate: str = setting("discriminant", "How experts are chosen: discriminant, representative or average-key.")
    features: Literal["binary", "graded", "tf-idf", "residual"] = setting(
        "binary", "What co-activation compares: who fires (binary), how strongly (graded), tf-idf or residual."
    )
    refine_rounds: int | None = setting(
        None,
        "Most rounds of moving neurons to where the gate finds their energy; 0 for none. Default: 8 with "
        "--split coactivation, 0 with other splits.",
        ge=0,
    )
    prefix: Literal["auto", "converted", "dense"] = setting(
        "auto",
        "Inputs that a layer's gate is fitted on: after converted layers or after dense ones. auto: converted "
        "if text is read for the gate.",
    )
    assignment: Literal["fast", "exact"] = setting("fast", "Balanced assignment in clustering: fast or exact (slow).")

    calibration: list[str] = setting(
        ["builtin"],
        "Text: a file, a folder, a dataset 'name[:config[:split]]', 'builtin', 'builtin-code' or corpus:NAME, which "
        f"is one of {', '.join(CORPUS_NAMES)}; several mix equally.",
    )
    calibration_tokens: int = setting(8192, "Tokens to calibrate on.", ge=1)
    held_out_tokens: int = setting(
        2048, "Tokens of the same text kept apart to measure quality; 0 for no report.", ge=0
    )
    held_out: list[str] = setting(
        [], "Text of other domains to measure on as well, --held-out-tokens of each; as for --calibration."
    )
    sequence_length: int = setting(512, "Tokens a block of text.", ge=8)
    seed: int = setting(0, "Seed of everything random.", **SEEDS)

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Element type that calibration runs in; auto: the checkpoint's. Weights keep their own type on disk."
    )
    calibrate_in: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "Matrix products of a float32 model while it only gathers statistics; auto: bfloat16 where this processor "
        "multiplies that faster. Quality is always measured in the model's own type.",
    )
    device: str = setting("auto", "Where layers run: auto, cpu, cuda, cuda:1, …")
    batch_tokens: int = setting(1024, "Tokens a forward call.", ge=1)
    cache_limit: float = setting(
        4.0, "GiB of hidden states kept in memory, all streams together; what is beyond lies on disk.", ge=0
    )
    checkpoint_seconds: float = setting(30.0, "Least seconds between two states that --resume can start from.", ge=0)

    resume: bool = setting(False, "Go on with an interrupted conversion of the same settings.")
    overwrite: bool = setting(False, "Replace an existing output folder, once the new one is complete.")
    dry_run: bool = setting(False, "Check everything, say what would be done and what it costs, write nothing.")
    accept_license: bool = setting(False, "Accept the licence of a packaged model that is not free for all use.")

    def to_yaml(self) -> str:
        """As a file for ``--config``: every setting of the conversion, nothing about this one run."""
        return yaml.safe_dump(self.model_dump(exclude={"resume", "overwrite", "dry_run", "output"}), sort_keys=False)


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
    gates: Literal["fixed", "learned"] = setting("fixed", "Whether the gates' tables are trained, too.")
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


class AnalyzeConfig(Settings):
    """Settings of a look inside: which modules a model uses on which text."""

    model: str = setting("", "Folder of a checkpoint with experts.")
    output: str = setting("", "Folder for tables, plots and page; must not exist unless --overwrite or --resume.")
    domains: list[str] = setting(
        [], "Text by name, NAME=TEXT, such as code=corpus:python; TEXT as for `emoe convert --calibration`."
    )
    tokens: int = setting(16384, "Tokens of each domain.", ge=1)
    sequence_length: int = setting(512, "Tokens a block of text.", ge=8)
    batch_sequences: int = setting(4, "Sequences a forward call.", ge=1)
    top_k: int | None = setting(None, "Experts a token uses meanwhile; default: the model's own.", ge=1)
    energies: bool = setting(True, "Also measure every expert's energy, and neurons; computes all of them.")
    examples: int = setting(10, "Tokens shown for each expert: those that activate it most.", ge=0)
    knock_out: int = setting(8, "Experts whose removal is tried on every domain: the most specialised.", ge=0)
    knock_out_tokens: int = setting(2048, "Tokens of each domain that a removal is tried on.", ge=1)
    checkpoint_seconds: float = setting(30.0, "Least seconds between two states that --resume can start from.", ge=0)
    seed: int = setting(0, "Seed of which blocks are drawn.", **SEEDS)
    resume: bool = setting(False, "Go on with an interrupted analysis of the same settings.")
    overwrite: bool = setting(False, "Replace an earlier analysis.")


class PruneConfig(Settings):
    """Settings of taking modules out."""

    model: str = setting("", "Folder of a checkpoint with experts.")
    output: str = setting("", "Folder to write; must not exist unless --overwrite is given.")
    text: list[str] = setting(
        [], "Text of the task, on which use is counted, such as corpus:python; as for `emoe convert --calibration`."
    )
    task: str | None = setting(None, "Labelled task whose training text is counted on, instead of --text.")
    keep: float | None = setting(None, "Fraction that stays.", gt=0, le=1)
    threshold: float | None = setting(None, "Instead of --keep: normalised use that a module needs to stay.", ge=0)
    normalise: Literal["max", "sum"] = setting("max", "Use is over the layer's largest (max) or over its sum.")
    count: Literal["probability", "hard", "energy"] = setting(
        "probability", "What is counted: choices weighted by probability, choices, or energy."
    )
    scope: Literal["model", "layer"] = setting("model", "Whether --keep is of the whole model or of each layer.")
    floor: int = setting(1, "Modules that every layer keeps at least.", ge=0)
    method: Literal["use", "random", "magnitude", "layers-uniform", "layers-top"] = setting(
        "use",
        "What goes: unused modules; or as baselines random ones, neurons of least ‖w_down‖·mean|h| (of a converted "
        "model, the result is a dense one), or whole layers, evenly spaced or the last ones.",
    )
    remove: Literal["last", "added"] | None = setting(
        None, "Instead of counting: take out what the last `emoe extend` added, or all that was ever added."
    )
    top_k: int | None = setting(None, "K of the result; default: the model's own, clipped to what is left.", ge=1)
    tokens: int = setting(16384, "Tokens of text to count on.", ge=1)
    sequence_length: int = setting(512, "Tokens a block of text.", ge=8)
    batch_sequences: int = setting(4, "Sequences a forward call.", ge=1)
    seed: int = setting(0, "Seed of everything random.", **SEEDS)
    overwrite: bool = setting(False, "Replace an existing output folder, once the new one is complete.")


COUNTING = frozenset({"text", "task", "count", "normalise", "tokens", "sequence_length", "batch_sequences"})
"""Settings of `PruneConfig` that have a part only where use is counted."""

FITTING = frozenset({"text", "old_text", "old_share", "tokens", "sequence_length"})
"""Settings of `ExtendConfig` that fitted gates come from."""


class ExtendConfig(Settings):
    """Settings of adding modules."""

    model: str = setting("", "Folder of a checkpoint with experts.")
    output: str = setting("", "Folder to write; must not exist unless --overwrite is given.")
    experts: int = setting(0, "FFN experts to add to each layer, of the size of the others.", ge=0)
    attention: int = setting(0, "Attention experts to add to each layer (ModuleFormer).", ge=0)
    text: list[str] = setting(
        [],
        "Text that the new modules are for, such as corpus:german: their gates open on it; as for `emoe convert "
        "--calibration`. [default: random gates]",
    )
    old_text: list[str] = setting([], "Text on which they are to stay shut, such as corpus:essays; with --text.")
    old_share: float = setting(0.1, "Share of the old text's tokens that may use them at first.", gt=0, lt=1)
    tokens: int = setting(8192, "Tokens of each of the two: half for directions, half for thresholds.", ge=64)
    sequence_length: int = setting(256, "Tokens in one block of text.", ge=8)
    seed: int = setting(0, "Seed of the new modules' weights, and of which passages are read.", **SEEDS)
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


def flag_of(key: str) -> str:
    """``calibration_tokens`` → ``--calibration-tokens``."""
    return "--" + key.replace("_", "-")


def presets() -> dict[str, Path]:
    """Preset name → file in configs/convert."""
    import emoe_configs

    folder = Path(emoe_configs.__file__).parent / "convert"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_config_file(path: Path, flag: str = "--config", kind: type[Settings] = ConvertConfig) -> dict[str, Any]:
    """Settings from a YAML file; keys are checked, values not yet.

    Raises:
        UserError: unreadable file, not a mapping, or an unknown key (the nearest known one is named).
    """
    values = read_yaml(path, flag)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{flag}: {path} must hold 'key: value' lines")
    for key in values:
        if key not in kind.model_fields:
            raise UserError(f"{flag}: {path}: unknown key {shortened(key)}{nearest(str(key), kind.model_fields)}")
    return values


def merge_settings(
    kind: type[Settings], flags: dict[str, Any], config_file: Path | None = None, under: dict[str, Any] | None = None
) -> Any:
    """Settings of a kind from flags over a file over `under`.

    Raises:
        UserError: an unknown key, or a value of the wrong kind; the flag is named.
    """
    values = {**(under or {}), **(read_config_file(config_file, kind=kind) if config_file else {})}
    values |= {key: value for key, value in flags.items() if value is not None}
    for key, value in values.items():
        if isinstance(value, Path):
            values[key] = value = str(value)
        if key not in kind.model_fields:
            raise UserError(f"{flag_of(key)}: there is no such setting{nearest(key, kind.model_fields)}")
        annotation = kind.model_fields[key].annotation
        if isinstance(value, str) and annotation == list[str]:
            values[key] = [value]
        elif annotation in (list[int], list[float]):
            items = value if isinstance(value, list) else [value]
            values[key] = [part for item in items for part in (item.split(",") if isinstance(item, str) else [item])]
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        raise UserError(f"{flag_of(key)}: {_demand(first)}, got {shortened(first['input'])}") from None


def _demand(error: Any) -> str:
    """What pydantic found missing in a value, said as to a user."""
    limits = error.get("ctx", {})
    number = {"int": "a whole number", "float": "a number"}
    match error["type"].split("_"):
        case ["greater", "than", "equal"]:
            return f"must be at least {limits['ge']:.15g}"
        case ["greater", "than"]:
            return f"must be above {limits['gt']:.15g}"
        case ["less", "than", "equal"]:
            return f"must be at most {limits['le']:.15g}"
        case ["less", "than"]:
            return f"must be below {limits['lt']:.15g}"
        case [("int" | "float") as kind, *_]:
            return f"must be {number[kind]}"
        case ["literal", "error"]:
            known = re.findall(r"'([^']+)'", limits["expected"])
            return f"must be one of {', '.join(known)}{nearest(str(error['input']), known)}"
    return error["msg"]


def resolve_config(flags: dict[str, Any], config_file: Path | None = None) -> tuple[ConvertConfig, str]:
    """Merge preset, file and flags; also one line on the preset that was taken and why.

    Raises:
        UserError: an unknown preset or key, or a value of the wrong kind; the flag is named.
    """
    given = read_config_file(config_file) if config_file else {}
    given |= {key: value for key, value in flags.items() if value is not None}
    if flags.get("active") is not None and flags.get("budget") is not None:  # a file that we wrote has both
        raise UserError("--budget: says how many experts are used, as --active does; give one of them")
    preset = str(given.get("preset") or DEFAULT_PRESET)
    known = presets()
    if preset not in known:
        raise UserError(
            f"--preset: unknown preset {shortened(preset)}{nearest(preset, known)}. Known: {', '.join(known)}"
        )
    why = "--preset" if given.get("preset") else WHY_DEFAULT_PRESET
    under = read_config_file(known[preset], "--preset")
    return merge_settings(ConvertConfig, {**given, "preset": preset}, under=under), f"preset '{preset}': {why}"
