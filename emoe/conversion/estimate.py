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
from emoe.config import ConvertConfig
from emoe.conversion.plan import MEASURED_FRACTIONS, check_experts, parse_layers
from emoe.errors import UserError
from emoe.families import family

BASE_BYTES = 650 << 20
"""Resident memory of the interpreter with torch, transformers and scikit-learn imported (measured: 0.60 GiB)."""


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
    reader = CheckpointReader(resolve_model(model).folder)  # a .gguf file, or a name that nobody knows
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
    a, b = torch.randn(1024, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
    a @ b
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        a @ b
        done += 1
    return done * 2 * 1024**3 / (time.perf_counter() - start)


def estimate(settings: ConvertConfig) -> Estimate:
    """Costs of converting ``settings.model`` with these settings.

    Raises:
        UserError: unknown model, or settings that do not fit it.
    """
    if not settings.model:
        raise UserError("--model: missing; give an alias (see `emoe models`), a folder or a hub id")
    config, item = shape_of(settings.model)
    spec = family(config.model_type)
    width, neurons, layers = config.hidden_size, spec.hidden_width(config), config.num_hidden_layers
    check_experts(neurons, settings.experts)
    chosen = parse_layers(settings.layers, layers)
    split, gate = clustering.get(settings.split), gating.get(settings.gate)
    per_layer, outside = count_parameters(config)

    watched = settings.calibration_tokens * (split.needs == "features" or gate.needs_calibration)
    measured = settings.held_out_tokens * (2 + len(MEASURED_FRACTIONS)) if settings.held_out_tokens else 0
    hidden_bytes = (2 * watched + measured) * width * item
    ffn = (3 if spec.gated else 2) * width * neurons
    # forward of calibration and held-out streams, hidden activations again for the gate, its normal equations
    flops = 2 * per_layer * (layers * measured + (chosen[-1] + 1) * watched)
    flops += len(chosen) * watched * (1.4 * ffn + 2 * 256 * neurons + 2 * width * (width + settings.experts))
    flops += 2 * outside * measured / max(1, 1 + (not config.tie_word_embeddings))
    dtype = getattr(torch, settings.dtype) if settings.dtype != "auto" else {2: torch.bfloat16}.get(item, torch.float32)
    disk = (per_layer * layers + outside) * item + len(chosen) * settings.experts * (width + 1) * 4
    columns = {"features": 256, "keys": width, "nothing": 0}[split.needs]
    clustering_seconds = len(chosen) * 1.1e-9 * neurons * columns * settings.experts * 20
    return Estimate(
        model=settings.model,
        parameters=per_layer * layers + outside,
        layers=layers,
        layer_bytes=per_layer * item,
        memory_bytes=BASE_BYTES + 2 * per_layer * item + outside * item + hidden_bytes,
        disk_bytes=disk,
        working_disk_bytes=(watched + measured) * width * item * 2,
        seconds=flops / (0.6 * measure_speed(dtype)) + clustering_seconds + disk / 500e6,
    )
