"""What a conversion costs in quality, measured while it streams: held-out text through the stock layers and, beside it,
through the converted layers at several K. No model is ever whole in memory.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch

from emoe.calibration.stream import HiddenStates, StreamedModel

MASKED_SHARE = 0.15
"""Share of tokens hidden from a masked language model (Devlin et al. 2019, sec. 3.1; always by the mask token)."""


@dataclass
class QualityRow:
    """Quality at one K."""

    top_k: int
    active: float
    """K / E."""
    value: float
    """Perplexity, masked-LM loss (nats), or mean relative error of the hidden states behind the last layer."""
    ratio: float | None
    """Value over the dense model's; None for hidden-state error, where dense is 0."""
    agreement: float
    """Share of tokens whose top prediction is the dense model's; mean cosine for hidden-state error."""
    ffn_flops: float
    """Multiplications of the converted layers' FFNs and gates over the dense FFNs'."""


@dataclass
class Quality:
    """The table that `emoe convert` prints."""

    measure: str
    dense: float
    tokens: int
    """Held-out tokens that were scored."""
    rows: list[QualityRow]

    def to_json(self) -> dict:
        """Plain types."""
        return asdict(self)


def mask_tokens(tokens: torch.Tensor, mask_id: int, special: list[int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hide a share of the tokens: (what the model sees, labels with -100 where nothing is scored)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.rand(tokens.shape, generator=generator) < MASKED_SHARE
    hidden &= ~torch.isin(tokens, torch.tensor(special, dtype=tokens.dtype))
    return torch.where(hidden, mask_id, tokens), torch.where(hidden, tokens, -100)


@torch.inference_mode()
def measure_streams(
    stream: StreamedModel,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    dense: HiddenStates,
    converted: dict[int, HiddenStates],
    flops: dict[int, float],
    num_experts: int,
) -> Quality:
    """Score the final hidden states of every stream on (sequences, T) tokens.

    Args:
        labels: next-token or masked labels at the place of the prediction; -100 is not scored. Unused for models
            without a language head.
        converted: hidden states by K.
        flops: cost by K, relative to dense.
    """
    sums = {k: [0.0, 0.0] for k in (None, *converted)}  # nats or error, agreements
    scored = 0
    for i in range(len(tokens)):
        sequence, wanted = tokens[i : i + 1], labels[i].to(stream.device)
        reference = None
        for k, states in ((None, dense), *converted.items()):
            if stream.measure == "hidden-state error":
                hidden = states.data[i].float()
                reference = hidden if k is None else reference
                error = (hidden - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-12)
                sums[k][0] += error.sum().item()
                sums[k][1] += torch.nn.functional.cosine_similarity(hidden, reference, dim=-1).sum().item()
                continue
            keep = wanted != -100
            logits = stream.head_once(sequence, states.data[i : i + 1]).logits[0, keep].float()
            best = logits.argmax(-1)
            reference = best if k is None else reference
            sums[k][0] += torch.nn.functional.cross_entropy(logits, wanted[keep], reduction="sum").item()
            sums[k][1] += (best == reference).sum().item()
        scored += tokens.shape[1] if stream.measure == "hidden-state error" else int((wanted != -100).sum())
    value = {k: _value(stream.measure, total[0] / max(1, scored)) for k, total in sums.items()}
    rows = [
        QualityRow(
            top_k=k,
            active=k / num_experts,
            value=value[k],
            ratio=value[k] / value[None] if value[None] else None,
            agreement=sums[k][1] / max(1, scored),
            ffn_flops=flops[k],
        )
        for k in sorted(converted)
    ]
    return Quality(stream.measure, value[None], scored, rows)


def _value(measure: str, mean: float) -> float:
    return math.exp(min(mean, 700.0)) if measure == "perplexity" else mean


def next_token_labels(tokens: torch.Tensor) -> torch.Tensor:
    """Each place predicts the token after it; the last one is not scored."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)
