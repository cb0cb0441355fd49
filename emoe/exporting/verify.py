"""Compare an export, loaded by stock transformers, with the converted model it was made from, on real text.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from emoe.calibration.text import BUILTIN, read_blocks, read_tokenizer
from emoe.checkpoint.companions import source_config
from emoe.errors import UserError
from emoe.exporting.choices import Choices
from emoe.exporting.source import Source, dtype_name
from emoe.exporting.spec import Format, Progress

LENGTH = 512
"""Tokens a sequence, or as many as the model takes."""

IMPOSED = "the same, choosing as the export does"
"""The converted model with the export's choices imposed on it (`Choices`)."""

SLICE = 128
"""Rows of (N, V) logits compared at a time: they stay in a processor's cache."""


@dataclass
class Comparison:
    """An export against one reference, over all tokens."""

    reference: str
    """What it was compared with, in words; `IMPOSED` for the model that had to choose as the export did."""
    tokens: int
    max_difference: float
    """Largest |Δ| of a logit, or of a last hidden state where there is no language head."""
    kl: float | None
    """Mean KL(reference ‖ export) in nats; None without a language head."""
    agreement: float
    """Share of tokens with the same first choice; mean cosine without a language head."""
    perplexity: list[float] | None
    """Of the reference and of the export; None for models that do not predict the next token."""
    relative: float | None = None
    """Mean length of Δ over that of a row of the reference; None with a language head, where `kl` says more."""
    choices: int | None = None
    """Choices of experts made, one a token and layer; only where those of the export were imposed."""
    changed: int | None = None
    """How many of them the reference would have made otherwise from the same input."""
    margin: float | None = None
    """How much worse the worst of these was, by the reference's gate, in standard deviations of a token's logits."""

    @property
    def finite(self) -> bool:
        """Whether everything measured is a number, neither infinite nor NaN."""
        numbers = [self.max_difference, self.kl, self.agreement, *(self.perplexity or []), self.relative, self.margin]
        return all(math.isfinite(number) for number in numbers if number is not None)

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        return asdict(self)


def kl_divergence(logits_NV: torch.Tensor, difference_NV: torch.Tensor) -> torch.Tensor:
    """KL(softmax(logits) ‖ softmax(logits - difference)) of each row in nats, (N,) fp64; NaN or infinite if they are.

    As E[d] + log E[exp(-d)] over the one distribution p: the rounding of p then cancels, and fp32 tells divergences of
    1e-11, where a difference of two log-softmaxes stops at 1e-7. Logits raised by more than 1 are summed as logarithms:
    their p may be 0 in fp32, and exp(-d) infinite.
    """
    p_NV = logits_NV.softmax(-1)
    # A constant changes no softmax. Less its mean, E[exp(-d)] is at least 1 and no rounding of p can make it 0 or less.
    difference_NV = difference_NV - (p_NV * difference_NV).sum(-1, keepdim=True)
    raised_NV = difference_NV < -1
    mean_N = (p_NV * difference_NV).sum(-1, dtype=torch.float64)
    near_N = torch.where(raised_NV, -p_NV, p_NV * torch.expm1(-difference_NV)).sum(-1, dtype=torch.float64)
    raised_N = (logits_NV.log_softmax(-1) - difference_NV).masked_fill(~raised_NV, -torch.inf).logsumexp(-1)
    return mean_N + torch.logaddexp(near_N.clamp_min(-1).log1p(), raised_N.double())


class _Sums:
    """What a `Comparison` adds up."""

    def __init__(self, reference: str, language: bool, causal: bool) -> None:
        self.reference, self.language, self.causal = reference, language, causal
        self.tokens, self.scored, self.largest = 0, 0, torch.zeros(())
        self.kl = self.agreed = self.length = self.off = 0.0
        self.nats = [0.0, 0.0]

    def add(self, ours: torch.Tensor, theirs: torch.Tensor, tokens_N: torch.Tensor) -> None:
        """One sequence: (N, V) logits or (N, D) hidden states of the reference and of the export."""
        for start in range(0, len(ours), SLICE):
            a, b = ours[start : start + SLICE], theirs[start : start + SLICE]
            difference = a - b
            self.largest = torch.maximum(self.largest, difference.abs().max())  # unlike max(), keeps a NaN
            self.tokens += len(a)
            if not self.language:
                self.agreed += torch.nn.functional.cosine_similarity(a, b, dim=-1).sum().item()
                self.length += a.norm(dim=-1).sum().item()
                self.off += difference.norm(dim=-1).sum().item()
                continue
            self.kl += kl_divergence(a, difference).sum().item()
            self.agreed += int((a.argmax(-1) == b.argmax(-1)).sum())
            if self.causal:
                wanted = tokens_N[start + 1 : start + 1 + len(a)]
                self.scored += len(wanted)
                for place, logits in enumerate((a, b)):
                    self.nats[place] += torch.nn.functional.cross_entropy(
                        logits[: len(wanted)], wanted, reduction="sum"
                    ).item()

    def finish(self) -> Comparison:
        """The means; min() and max() keep a NaN that comes first."""
        perplexity = [math.exp(min(nats / max(1, self.scored), 700.0)) for nats in self.nats]
        return Comparison(
            self.reference,
            self.tokens,
            self.largest.item(),
            max(self.kl / self.tokens, 0.0) if self.language else None,
            self.agreed / self.tokens,
            perplexity if self.scored else None,
            None if self.language else self.off / max(self.length, 1e-30),
        )


@torch.inference_mode()
def verify(
    source: Source, format: Format, folder: Path, tokens: int, text: str | None, progress: Progress
) -> list[Comparison]:
    """Load both models and run the same text through them, a sequence at a time.

    The first comparison is with the model that was to be written: fixed K under ``fix_k``, all experts for a format
    that does not route. If that is not what the checkpoint does by itself, a second one says how far it is from that.
    The last one is with the model that has to choose as the export did: what is left is arithmetic, without ties.
    The export runs in the element type that is written, the model in `Source.compared`: what ``dtype`` rounds counts.
    Memory: both models, each in its type, and two sequences' logits.

    Raises:
        UserError: no usable tokenizer, or too little text.
    """
    auto = auto_class(source)
    blocks = _text(source, tokens, text)
    theirs = format.load(folder, source.written, *([auto] if format.name == "dense" else []))
    ours = _converted(source, auto)
    language = auto in ("AutoModelForCausalLM", "AutoModelForMaskedLM")
    causal = auto == "AutoModelForCausalLM"
    wanted = _Sums(_what(source, format), language, causal)
    native = _Sums(f"{_model(source)} as it routes", language, causal) if format.routes and source.fix_k else None
    same = _Sums(IMPOSED, language, causal) if format.routes else None
    choices = Choices(theirs, ours, source.shared) if format.routes else None
    for number, block in enumerate(blocks):
        progress("verifying", number, len(blocks))
        block_1N = torch.tensor([block])
        result = _run(theirs, block_1N)
        with _as_written(ours, source, format):
            wanted.add(_run(ours, block_1N), result, block_1N[0])
            if same:
                with choices.imposed():
                    same.add(_run(ours, block_1N), result, block_1N[0])
        if native:
            native.add(_run(ours, block_1N), result, block_1N[0])
    progress("done", len(blocks), len(blocks))
    found = [sums.finish() for sums in (wanted, native, same) if sums]
    if choices:
        found[-1] = replace(found[-1], choices=choices.made, changed=choices.changed, margin=choices.margin)
    return found


def auto_class(source: Source) -> str:
    """The Auto class of the architecture that the checkpoint was saved as."""
    from emoe.modeling.auto import stock_classes

    saved = source_config(source.config)["architectures"] or []
    known = stock_classes(source.reader.spec.model_type)
    return next((auto for auto, name in known.items() if name in saved), "AutoModel")


def _converted(source: Source, auto: str) -> Any:
    import transformers

    import emoe  # noqa: F401 - teaches the Auto classes

    loader = getattr(transformers, auto)
    return loader.from_pretrained(source.folder, dtype=source.compared, trust_remote_code=False).eval()


def _text(source: Source, tokens: int, text: str | None) -> list[list[int]]:
    tokenizer = read_tokenizer(source.folder, "give --verify-tokens 0")
    reader = source.reader
    positions = getattr(reader.config, "max_position_embeddings", None) or LENGTH + reader.spec.position_offset
    length = min(LENGTH, positions - reader.spec.position_offset, tokens)
    least = 2 + tokenizer.num_special_tokens_to_add()
    if length < least:
        raise UserError(f"--verify-tokens: sequences of {length} are too short; give at least {least}, or 0")
    blocks = read_blocks(text or BUILTIN, tokenizer, length, -(-tokens // length), "--verify-text")
    if not blocks:
        raise UserError(f"--verify-text: {text or BUILTIN} is shorter than {length} tokens; give more text")
    return blocks


def _run(model: Any, tokens_1N: torch.Tensor) -> torch.Tensor:
    """(N, V) logits; (1, labels) of a classifier; (N, D) last hidden states without a head."""
    output = model(tokens_1N)
    found = output.logits if "logits" in output else output.last_hidden_state
    return found.reshape(-1, found.shape[-1]).float()


def _what(source: Source, format: Format) -> str:
    if not format.routes:
        added = ", those that were added as their gates say" if source.extended else ""
        return f"{_model(source)} with all experts on{added}"
    return f"{_model(source)}, {source.top_k} experts for every token" if source.fix_k else _model(source)


def _model(source: Source) -> str:
    """What the export is compared with, and in which element type where it was given another."""
    other = source.written != source.reader.dtype
    return f"the converted model in {dtype_name(source.compared)}" if other else "the converted model"


@contextlib.contextmanager
def _as_written(model: Any, source: Source, format: Format) -> Iterator[None]:
    """The converted model as the export has it: a fixed number of experts, or all."""
    routers = [ffn.router for ffn in model.sparse_ffns().values()]
    before = [(router.rule, router.top_k, router._buffers.pop("bounds", None)) for router in routers]
    for router in routers:
        router.rule, router.top_k = "top-k", source.top_k if format.routes else source.num_experts
    try:
        yield
    finally:
        for router, (rule, top_k, bounds) in zip(routers, before, strict=True):
            router.rule, router.top_k = rule, top_k
            if bounds is not None:
                router._buffers["bounds"] = bounds
