"""What a conversion will take, before anything is loaded: from the shape of the model and the speed of this machine.

Legend: D model width, F hidden width, E experts.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from emoe import clustering, gating
from emoe.assets.resolve import check_name
from emoe.calibration.statistics import FEATURE_WIDTH
from emoe.clustering.balanced import ROUGH_ITERATIONS
from emoe.config import ConvertConfig
from emoe.conversion.convert import END_SHARD_BYTES
from emoe.conversion.plan import MEASURED_FRACTIONS, automatic, check_experts, parse_layers, with_budget
from emoe.errors import UserError
from emoe.families import family
from emoe.runtime import multiplies_bfloat16_fast

BASE_BYTES = 560 << 20
"""Resident memory of the interpreter with torch, transformers and scikit-learn imported (measured: 561 MiB)."""


STARTUP_SECONDS = 8.0
"""Imports, reading text, config and headers."""
READ_SPEED, WRITE_SPEED = 300e6, 280e6
"""Bytes a second: reading with the check for NaN and the digest, and writing to a disk that is waited for."""
BEST_EFFICIENCY, HALF_WIDTH = 0.8, 350
"""Of a layer's products against one large product: attention, norms and activations are in between, and weigh less the
wider the model. Chosen so that the estimates come near what SmolLM2 (D 576) and two layers of D 4096 took."""
CLUSTERING_ITERATIONS = 20
ASSIGNMENT_SECONDS = 2.2e-7
"""A point and cluster of one balanced assignment."""
ELEMENT_SECONDS = 4.0e-8
"""A token and neuron of what the survey and the fit do beside products."""
ROUND_SECONDS = 7e-9
"""A token and neuron of a round of refinement, beside products."""
ROUNDS = 4
"""Rounds of refinement that are usually made."""
LOSS_SECONDS = 2.5e-9
"""A token and vocabulary entry of a cross-entropy."""
WORKSPACE_BYTES = 350 << 20
"""Batches of activations, tables of a gate, what the allocator keeps."""


@dataclass
class Estimate:
    """Costs of one conversion."""

    model: str
    parameters: int
    layers: int
    layer_bytes: int
    memory_bytes: int
    """Peak resident memory: the interpreter, two layers, embeddings and head, hidden states."""
    disk_bytes: int
    """Size of the converted checkpoint."""
    working_disk_bytes: int
    """Further bytes on the same disk while it runs."""
    seconds: float
    """On this machine, from its measured speed of matrix multiplication, disk and clustering."""

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def shape_of(model: str) -> tuple[Any, int]:
    """The stock config of an alias, folder, or hub id, and the bytes of a weight; weights are not fetched.

    Raises:
        UserError: nothing is known of the shape without fetching the model.
    """
    from pathlib import Path

    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from emoe.assets import ALIASES, resolve_model
    from emoe.checkpoint.reader import CheckpointReader

    if Path(model).is_dir():
        reader = CheckpointReader(model)
        return reader.config, reader.dtype.itemsize
    alias = ALIASES.get(model.lower())
    if alias is not None:
        return CONFIG_MAPPING[alias.family].from_dict(alias.shape), 4 if alias.package else 2
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not Path(model).exists():
        return _hub_config(model), 2
    reader = CheckpointReader(resolve_model(model).folder)  # a .gguf file
    return reader.config, reader.dtype.itemsize


def _hub_config(hub_id: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(hub_id, trust_remote_code=False)
    except OSError:
        raise UserError(f"--model: the hub cannot be reached for the shape of {hub_id}; give a local folder") from None


def count_parameters(config: Any) -> tuple[int, int]:
    """Parameters of one layer and of everything outside the layers, from the model on the meta device."""
    from transformers import AutoModel, AutoModelForCausalLM

    spec = family(config.model_type)
    with torch.device("meta"):
        model = (AutoModel if spec.encoder else AutoModelForCausalLM).from_config(config)
    base = getattr(model, model.base_model_prefix, model)
    layers = base.get_submodule(spec.layers)
    inside = sum(p.numel() for p in layers.parameters())
    return inside // len(layers), sum(p.numel() for p in model.parameters()) - inside


def measure_speed(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Floating-point operations a second of a large matrix product on this machine."""
    slow = dtype != torch.float32 and not multiplies_bfloat16_fast()  # a large product would take seconds
    size = 256 if slow else 1024
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    a @ b
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ b
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - start)


@dataclass(frozen=True)
class _Speeds:
    """Floating-point operations a second: in fp32, in the model's type, in the type of statistics."""

    fp32: float
    model: float
    statistics: float


@dataclass(frozen=True)
class _Shape:
    """What a layer's work depends on."""

    width: int
    neurons: int
    experts: int
    layers: int
    gated: bool
    item: int

    @property
    def matrices(self) -> int:
        return 3 if self.gated else 2

    def clustering_seconds(self, columns: int, iterations: int, speed: _Speeds) -> float:
        """One balanced k-means; its products run on one thread."""
        flops = 2 * self.neurons * columns * self.experts * iterations
        return flops / (0.5 * speed.fp32) + iterations * self.neurons * self.experts * ASSIGNMENT_SECONDS

    def survey_seconds(self, tokens: int, rounds: int, speed: _Speeds) -> float:
        """Statistics and refinement of a layer, without the layer itself."""
        flops = 2 * tokens * self.neurons * FEATURE_WIDTH
        seconds = tokens * self.neurons * ELEMENT_SECONDS / 2
        if rounds:
            made = min(rounds, ROUNDS)
            flops += 2 * tokens * (self.width**2 + made * 2 * self.neurons * self.experts)
            seconds += made * (tokens * self.neurons * ROUND_SECONDS + self.neurons * self.experts * ASSIGNMENT_SECONDS)
        return seconds + flops / speed.fp32

    def fit_seconds(self, tokens: int, speed: _Speeds) -> float:
        """The gate, and what skipped neurons would have added, without the layer itself."""
        flops = 2 * tokens * (self.width**2 + self.neurons * self.neurons // self.experts + self.width * self.experts)
        made_sparse = 2 * tokens * self.width * self.neurons / speed.model
        solve = 3 * self.width**3 / speed.fp32
        return flops / speed.fp32 + made_sparse + solve + tokens * self.neurons * ELEMENT_SECONDS / 2


def estimate(settings: ConvertConfig) -> Estimate:
    """Costs of converting ``settings.model`` with these settings.

    Raises:
        UserError: unknown model, or settings that do not fit it.
    """
    check_name(settings.model)
    settings = with_budget(settings)
    config, item = shape_of(settings.model)
    spec = family(config.model_type)
    shape = _Shape(
        width=config.hidden_size,
        neurons=spec.hidden_width(config),
        experts=settings.experts,
        layers=config.num_hidden_layers,
        gated=spec.gated,
        item=item,
    )
    check_experts(shape.neurons, settings.experts)
    chosen = parse_layers(settings.layers, shape.layers)
    split, gate = clustering.get(settings.split), gating.get(settings.gate)
    auto = automatic(settings, gate.needs_calibration)
    per_layer, outside = count_parameters(config)

    surveyed = split.needs == "features" or auto["allocation"] == "sensitivity" or settings.shared_experts > 0
    adds = settings.compensate or settings.refit_outputs or auto["allocation"] != "uniform"
    fitted = gate.needs_calibration or auto["routing"] != "top-k" or adds
    tokens = settings.calibration_tokens
    held_out = settings.held_out_tokens * (1 + len(settings.held_out))
    streams = 1 + len(MEASURED_FRACTIONS)
    parameters = per_layer * shape.layers + outside
    disk = parameters * item + len(chosen) * settings.experts * (shape.width + 6) * 4

    dtype = {2: torch.bfloat16}.get(item, torch.float32) if settings.dtype == "auto" else getattr(torch, settings.dtype)
    narrow = torch.bfloat16 if multiplies_bfloat16_fast() else dtype
    speed = _Speeds(measure_speed(torch.float32), measure_speed(dtype), measure_speed(narrow))
    efficiency = BEST_EFFICIENCY * shape.width / (shape.width + HALF_WIDTH)
    seconds = STARTUP_SECONDS + parameters * item / READ_SPEED + disk / WRITE_SPEED
    if surveyed:
        seconds += (chosen[-1] + 1) * tokens * 2 * per_layer / (efficiency * speed.statistics)
        seconds += len(chosen) * shape.survey_seconds(tokens, auto["refine_rounds"], speed)
    if split.needs == "keys":
        seconds += len(chosen) * shape.clustering_seconds(shape.width, CLUSTERING_ITERATIONS, speed)
    elif split.needs == "features":
        rough = ROUGH_ITERATIONS if auto["refine_rounds"] else CLUSTERING_ITERATIONS
        seconds += len(chosen) * shape.clustering_seconds(FEATURE_WIDTH, rough, speed)
    if fitted:
        seconds += (chosen[-1] + 1) * tokens * 2 * per_layer / (efficiency * speed.statistics)
        seconds += len(chosen) * shape.fit_seconds(tokens, speed)
    if held_out:
        ffn = shape.matrices * shape.width * shape.neurons
        active = [1.0, *MEASURED_FRACTIONS]
        work = sum(shape.layers * (per_layer - ffn * (1 - a)) for a in active)
        seconds += held_out * 2 * work / (efficiency * speed.model)
        head = config.vocab_size * shape.width
        seconds += held_out * streams * (2 * head / (efficiency * speed.model) + config.vocab_size * LOSS_SECONDS)

    cached = (tokens * (2 * surveyed + fitted) + held_out * streams) * shape.width * item
    cached += tokens * shape.neurons * item * (surveyed or fitted)
    ends = min(outside * item, END_SHARD_BYTES) if not (surveyed or held_out) else outside * item
    return Estimate(
        model=settings.model,
        parameters=parameters,
        layers=shape.layers,
        layer_bytes=per_layer * item,
        memory_bytes=BASE_BYTES + max(2 * per_layer * item + cached + WORKSPACE_BYTES, ends),
        disk_bytes=disk,
        working_disk_bytes=2 * (tokens * (surveyed or fitted) + held_out * streams) * shape.width * item,
        seconds=seconds,
    )
