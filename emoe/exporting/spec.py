"""What a format is: what it can represent, what it costs, how it is written and how it is read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emoe.exporting.source import Source

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``."""

TOLERANCE = 1e-8
"""`Format.tolerance` of formats whose arithmetic is the model's."""

MARGIN = 1e-3
"""`Format.margin` of formats that choose by the model's own logits: rounding explains less, an error gives more."""


@dataclass(frozen=True)
class Capabilities:
    """What a stock mixture-of-experts can represent beyond a fixed number of experts a token, chosen linearly."""

    partial: bool = False
    """Some layers stay dense."""
    router_bias: bool = False
    """Gate logits with a bias: the discriminant gate."""
    shared: bool = False
    """Experts that every token uses."""
    compensation: bool = False
    """A constant vector added to a layer's output."""
    query_bias: bool = False
    """Biases in the query, key and value projections."""
    output_bias: bool = False
    """A bias in attention's output projection."""
    window: bool = False
    """Attention within a sliding window."""
    activation: bool = True
    """Experts have the activation that config.json names."""
    lossless: bool = True
    """Chooses by raw logits and can weigh the chosen alike. A softmax before the choice cannot do both."""


@dataclass(frozen=True)
class Cost:
    """What the user is told before anything is written."""

    nbytes: int
    """Size of the weights on disk, in bytes."""
    exactness: str
    """One line: what is kept bit for bit, what is rounded, what is lost."""


@dataclass(frozen=True)
class Format:
    """One way out. A further one is one new file with a ``FORMAT`` and one line in `emoe.exporting.FORMATS`."""

    name: str
    routes: bool
    """The result still chooses experts; without, it is compared with the model with all experts on."""
    refusal: Callable[[Source], str | None]
    """One line, naming the flags that would help, when the format cannot represent this model."""
    cost: Callable[[Source], Cost]
    write: Callable[[Source, Path, Progress], dict[str, Any]]
    """Write weights, config and companions into a folder; returns facts for the report."""
    load: Callable[[Path, Any], Any]
    """Read the folder back with stock transformers, in an element type."""
    tolerance: float = TOLERANCE
    """Mean KL divergence from the reference, in nats, beyond which the export of a float32 model is thrown away; of
    formats that choose experts, on the same choices. 16-bit models get `NARROW_TOLERANCE`."""
    margin: float = MARGIN
    """How far an expert that a float32 export chose may lie behind one that it left out, by the model's own gate, in
    standard deviations of the token's logits. 16-bit models get `NARROW_MARGIN`."""


NARROW_TOLERANCE = 0.05
"""As `Format.tolerance`, for exports of 16 bits, whose weights are rounded and whose sums in another order differ in
the last of few bits: SmolLM2 as GPT-OSS, both in bfloat16, on the same choices, 2.7e-3 nats; the tests' models against
float32 up to 3.3e-3. Weights of experts that follow their logits leave 0.4."""

NARROW_MARGIN = 1.0
"""As `Format.margin`, for exports of 16 bits: stock routers multiply in 16 bits, and so does all before them. SmolLM2
0.16, the tests' models up to 0.48; a router with the rows of other experts 3.6."""


RELATIVE_TOLERANCE = 1e-3
"""As `Format.tolerance` where there is no language head, of `Comparison.relative`. Rounding leaves 1.1e-6 on
all-MiniLM-L6-v2."""

NARROW_RELATIVE_TOLERANCE = 0.2
"""The same for exports of 16 bits: the tests' models up to 0.03; an encoder with FFN tensors times 3, 0.42."""


def load_stock(folder: Path, dtype: Any, auto: str = "AutoModelForCausalLM") -> Any:
    """The model that stock transformers makes of a folder, in eval mode.

    Raises:
        RuntimeError: the class that loads it is not one of transformers' own.
    """
    import transformers

    model = getattr(transformers, auto).from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()
    if not type(model).__module__.startswith("transformers.models."):
        raise RuntimeError(f"{folder} was loaded by {type(model).__module__}, which is not stock")
    return model
