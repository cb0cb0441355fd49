"""Settings of `emoe convert`."""

from __future__ import annotations

from typing import Literal

import yaml

from emoe.config.base import CORPUS_NAMES, SEEDS, Settings, setting


class ConvertConfig(Settings):
    """Settings of a conversion."""

    model: str = setting("", "Dense checkpoint: an alias (see `emoe models`), a folder, a .gguf file or a hub id.")
    revision: str | None = setting(None, "Branch, tag or commit of a hub model.")
    output: str = setting(
        "",
        "Folder to write; must not exist unless --overwrite or --resume is given. Default: the model's name and -emoe.",
    )
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
