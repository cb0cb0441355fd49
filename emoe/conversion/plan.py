"""Check a conversion before it starts, and say what it will cost. Nothing is loaded but headers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emoe import clustering, gating
from emoe.checkpoint.companions import check_companions
from emoe.checkpoint.reader import CheckpointReader
from emoe.clustering.spec import nearest_divisors
from emoe.config import ConvertConfig
from emoe.errors import UserError
from emoe.runtime import format_bytes

MEASURED_FRACTIONS = (0.25, 0.5, 0.75)
"""Shares of experts at which a conversion reports quality. With all of them the model is the dense one, which is
checked a layer at a time (`emoe.conversion.layer.put_in_order`)."""

REFINE_ROUNDS = 8
"""Most rounds of refinement unless --refine-rounds says otherwise; three or four gain what is to be gained."""

SLACK = 64 << 20
"""Bytes for tokenizer, code, report and plot."""


def parse_layers(text: str, num_layers: int) -> list[int]:
    """``"all"``, ``"16:32:4"``, ``"26,28"``, ``"-4::2"`` or a mixture with commas → sorted layer indices.

    Raises:
        UserError: not of that form, out of range, or no layer at all.
    """
    span = f"the model has {num_layers} layers, 0 to {num_layers - 1}"
    chosen: set[int] = set()
    for part in text.replace(" ", "").split(","):
        if part == "all":
            chosen |= set(range(num_layers))
            continue
        try:
            numbers = [int(n) if n else None for n in part.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) == 1 and numbers[0] is not None:
            if not -num_layers <= numbers[0] < num_layers:
                raise UserError(f"--layers: layer {numbers[0]} is out of range; {span}")
            chosen.add(numbers[0] % num_layers)
        elif len(numbers) in (2, 3) and (len(numbers) == 2 or numbers[2] != 0):
            start, stop = numbers[:2]
            beyond = [n for n in (start, stop) if n is not None and not -num_layers <= n <= num_layers]
            if beyond or start == num_layers:
                raise UserError(f"--layers: '{part}' is out of range; {span}")
            chosen |= set(range(num_layers)[slice(*numbers)])
        else:
            raise UserError(f"--layers: '{part}' is not 'all', a number or a slice such as 16:32:4")
    if not chosen:
        raise UserError(f"--layers: '{text}' selects no layer; {span}")
    return sorted(chosen)


def check_experts(num_neurons: int, experts: int) -> None:
    """Raise `UserError` unless ``experts`` divides ``num_neurons``; the nearest numbers that do are named."""
    if num_neurons % experts:
        advice = nearest_divisors(num_neurons, experts)
        raise UserError(f"--experts: FFN width {num_neurons} is not divisible by {experts}; try {advice}")


@dataclass
class Plan:
    """A conversion that has passed every check that needs no weights."""

    config: ConvertConfig
    reader: CheckpointReader
    source: str
    """What the user called the model."""
    origin: str
    """Where it came from, with a digest or commit where there is one."""
    layers: list[int]
    num_neurons: int
    top_k: int
    allocation: str
    routing: str
    prefix: str
    refine_rounds: int
    notes: list[str] = field(default_factory=list)
    measured: list[int] | None = None
    """Numbers of experts at which quality is measured, where not the usual ones."""
    licence: dict[str, Any] = field(default_factory=dict)
    """Of the source, as `emoe.checkpoint.companions.licence_of` has it."""

    @property
    def split(self) -> Any:
        """Clustering method."""
        return clustering.get(self.config.split)

    @property
    def gate(self) -> Any:
        """Gate method."""
        return gating.get(self.config.gate, measuring=True)

    @property
    def needs_survey(self) -> bool:
        """Whether text goes once through the dense model, to cluster its neurons or to share out the budget."""
        return self.split.needs == "features" or self.allocation == "sensitivity" or self.config.shared_experts > 0

    @property
    def needs_magnitudes(self) -> bool:
        """Whether that pass keeps every neuron's share of energy on every token."""
        return self.refine_rounds > 0 or self.allocation == "sensitivity"

    @property
    def needs_fit(self) -> bool:
        """Whether a layer's router is fitted to text: its gate, or how many experts a token gets."""
        calibrated = self.gate.needs_calibration and self.config.gate != "oracle"
        adds = self.config.compensate or self.config.refit_outputs
        return calibrated or self.routing != "top-k" or self.allocation != "uniform" or adds

    @property
    def needs_activations(self) -> bool:
        """Whether anything but the measurement of quality looks at text."""
        return self.needs_survey or self.needs_fit

    @property
    def needs_text(self) -> bool:
        """Whether any text is read."""
        return self.needs_activations or self.config.held_out_tokens > 0

    @property
    def measured_k(self) -> list[int]:
        """Numbers of experts at which quality is measured, ascending, the chosen K among them."""
        counts = {max(1, round(f * self.config.experts)) for f in MEASURED_FRACTIONS}
        if self.config.refit_outputs:  # with all of them the model is another now
            counts |= {self.config.experts}
        return self.measured or sorted(counts | {self.top_k})

    @property
    def num_held_out(self) -> int:
        """Held-out tokens of all domains together."""
        return self.config.held_out_tokens * (1 + len(self.config.held_out))

    def gate_bytes(self) -> int:
        """Size of the gate tables that the checkpoint gains, bytes."""
        width = self.reader.config.hidden_size
        entry = {"discriminant": 4 * (width + 1), "representative": 12}.get(self.config.gate, 0)
        levels = 20 if self.routing != "top-k" or self.allocation != "uniform" else 0
        return len(self.layers) * (self.config.experts * (entry + levels) + 4 * width * self.config.compensate)

    @property
    def _item_bytes(self) -> int:
        """Bytes of an entry of a hidden state, at most."""
        return 2 if self.config.dtype in ("bfloat16", "float16") else 4

    def state_bytes(self) -> int:
        """Size of the state that --resume starts from, bytes: hidden states of calibration and held-out streams."""
        tokens = self.config.calibration_tokens * self.needs_activations
        tokens += self.num_held_out * (1 + len(self.measured_k))
        return tokens * self.reader.config.hidden_size * self._item_bytes

    def disk_bytes(self) -> int:
        """Bytes that the output's disk must have free: the checkpoint, two states, hidden states past --cache-limit."""
        width = self.reader.config.hidden_size
        tables = (
            self.config.calibration_tokens * (2 * width + self.num_neurons) * self._item_bytes * self.needs_activations
        )
        spilled = max(0, 2 * self.state_bytes() + tables - int(self.config.cache_limit * (1 << 30)))
        return self.reader.total_bytes() + self.gate_bytes() + 2 * self.state_bytes() + spilled + SLACK

    def describe(self) -> list[str]:
        """What will be done, a line each."""
        c, per_expert = self.config, self.num_neurons // self.config.experts
        where = "all" if len(self.layers) == self.reader.num_layers else ", ".join(map(str, self.layers))
        return [
            *self.notes,
            f"model: {self.source} ({self.reader.spec.model_type}, {self.reader.num_layers} layers, "
            f"FFN width {self.num_neurons})",
            f"layers: {where}",
            f"experts: {c.experts} of {per_expert} neurons, {self.top_k} a token; split {c.split}, gate {c.gate}",
            f"routing: {self.routing}, budget {self.allocation}; gate fitted on the {self.prefix} prefix; "
            f"{self.refine_rounds} rounds of refinement at most",
            f"disk: {format_bytes(self.disk_bytes())} needed in {Path(c.output).absolute().parent}",
        ]


def check_device(device: str) -> None:
    """Raise `UserError` unless PyTorch can compute on ``device`` here."""
    if device == "auto":
        return
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: '{device}' is not usable here ({str(error).splitlines()[0]}); try cpu") from None


def make_plan(
    config: ConvertConfig,
    reader: CheckpointReader,
    source: str,
    origin: str,
    notes: list[str],
    measured: list[int] | None = None,
    licence: dict[str, Any] | None = None,
) -> Plan:
    """Check settings against the checkpoint. With `measured`, a plan to measure only, which may use the oracle gate.

    Raises:
        UserError: the first check that fails, naming its flag.
    """
    clustering.get(config.split)
    gate = gating.get(config.gate, measuring=measured is not None)
    check_companions(reader.folder)
    layers = parse_layers(config.layers, reader.num_layers)
    num_neurons = reader.hidden_width
    check_experts(num_neurons, config.experts)
    config = with_budget(config)
    top_k = config.top_k or max(1, round(config.active * config.experts))
    if top_k > config.experts:
        raise UserError(f"--top-k: {top_k} is more than --experts {config.experts}; choose 1 to {config.experts}")
    if config.shared_experts and config.shared_experts >= top_k:
        raise UserError(f"--shared-experts: {config.shared_experts} leave none of {top_k} to choose; take fewer")
    check_device(config.device)
    longest = getattr(reader.config, "max_position_embeddings", None) or config.sequence_length
    longest -= reader.spec.position_offset
    if config.sequence_length > longest:
        notes = [*notes, f"--sequence-length lowered from {config.sequence_length} to the model's {longest}"]
        config = config.model_copy(update={"sequence_length": longest})
    return Plan(
        config,
        reader,
        source,
        origin,
        layers,
        num_neurons,
        top_k,
        **automatic(config, gate.needs_calibration),
        notes=notes,
        measured=measured,
        licence=licence or {},
    )


def automatic(config: ConvertConfig, calibrated: bool) -> dict[str, Any]:
    """The settings that are "auto": what pays when text is read for the gate, and what needs none otherwise."""
    pick = lambda value, with_text, without: (with_text if calibrated else without) if value == "auto" else value  # noqa: E731
    rounds = REFINE_ROUNDS if config.split == "coactivation" else 0
    return {
        "allocation": pick(config.allocation, "sensitivity", "uniform"),
        "routing": pick(config.routing, "threshold", "top-k"),
        "prefix": pick(config.prefix, "converted", "dense"),
        "refine_rounds": rounds if config.refine_rounds is None else config.refine_rounds,
    }


def with_budget(config: ConvertConfig) -> ConvertConfig:
    """`--budget X` spelt out."""
    if config.budget is None:
        return config
    if config.top_k is not None:
        raise UserError("--budget: says how many experts are used, as --top-k does; give one of them")
    if config.allocation == "uniform":
        raise UserError("--budget: shares experts out by sensitivity, --allocation uniform does not; use --active")
    return config.model_copy(update={"active": config.budget, "allocation": "sensitivity"})
