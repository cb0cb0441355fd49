"""Settings of looking inside and of changing what is there: `emoe analyze`, `emoe prune` and `emoe extend`."""

from __future__ import annotations

from typing import Literal

from emoe.config.base import SEEDS, Settings, setting


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
