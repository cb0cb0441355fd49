"""What a conversion costs in quality, measured while it streams: held-out text through the stock layers and, beside it,
through the converted layers at several K. No model is ever whole in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from emoe.calibration.stream import HiddenStates, StreamedModel

MASKED_SHARE = 0.15
"""Share of tokens hidden from a masked language model (Devlin et al. 2019, sec. 3.1; always by the mask token)."""


@dataclass
class QualityRow:
    """Quality at one K on one domain."""

    top_k: int
    active: float
    """Share of the experts that tokens got, on average over tokens and converted layers of all domains."""
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
    domains: dict[str, Quality] | None = None
    """The same on text of further domains."""

    def to_json(self) -> dict:
        """Plain types."""
        return asdict(self)


class Load:
    """How often each of E experts was chosen, and how many a token got."""

    def __init__(self, num_experts: int) -> None:
        self.chosen_E = torch.zeros(num_experts, dtype=torch.int64)
        self.tokens_1 = torch.zeros(1, dtype=torch.int64)

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What adds up over batches and processes."""
        return self.chosen_E, self.tokens_1

    def add(self, experts_NK: torch.Tensor) -> None:
        """Count a routing; -1 marks unused slots."""
        counts = torch.bincount(experts_NK.flatten().cpu() + 1, minlength=len(self.chosen_E) + 1)
        self.chosen_E += counts[1:]
        self.tokens_1 += len(experts_NK)

    def merge(self, other: Load) -> None:
        """Add what another has counted; experts of different layers are different experts under one number."""
        self.chosen_E += other.chosen_E
        self.tokens_1 += other.tokens_1

    @property
    def active(self) -> float:
        """Share of the experts that a token got, on average; all where nothing was counted: no router was asked."""
        if int(self.tokens_1) == 0:
            return 1.0
        return self.chosen_E.sum().item() / max(1, int(self.tokens_1) * len(self.chosen_E))

    def to_json(self) -> list:
        """Plain types."""
        return [self.chosen_E.tolist(), int(self.tokens_1)]

    @classmethod
    def from_json(cls, value: list) -> Load:
        """The inverse."""
        load = cls(len(value[0]))
        load.chosen_E, load.tokens_1 = torch.tensor(value[0]), torch.tensor([value[1]])
        return load

    def summary(self) -> dict[str, float] | None:
        """How evenly experts are used: busiest and idlest share times E (1 is even), and entropy over its maximum."""
        total, experts = int(self.chosen_E.sum()), len(self.chosen_E)
        if total == 0:
            return None
        p_E = self.chosen_E.double() / total
        entropy = -(p_E * p_E.clamp_min(1e-12).log()).sum().item()
        return {
            "active": round(self.active, 4),
            "busiest": round(p_E.max().item() * experts, 4),
            "idlest": round(p_E.min().item() * experts, 4),
            "evenness": round(entropy / math.log(experts), 4) if experts > 1 else 1.0,
        }


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
    domains: torch.Tensor,
    names: list[str],
    active: dict[int, float],
    flops: dict[int, float],
    total: Callable[..., None] = lambda *tensors: None,
) -> Quality:
    """Score the final hidden states of every stream on (sequences, T) tokens.

    Args:
        labels: next-token or masked labels at the place of the prediction; -100 is not scored. Unused for models
            without a language head.
        converted: hidden states by K.
        domains: index into `names` of each sequence; the first domain is the calibration text's.
        active: share of experts that tokens got, by K.
        flops: cost by K, relative to dense.
        total: adds tensors up over processes, in place.
    """
    keys = [None, *sorted(converted)]
    sums = torch.zeros(len(names), len(keys), 2, dtype=torch.float64)  # nats or error, agreements
    scored = torch.zeros(len(names), dtype=torch.float64)
    for i in range(len(tokens)):
        sequence, wanted = tokens[i : i + 1], labels[i].to(stream.device)
        reference = None
        for place, k in enumerate(keys):
            states = dense if k is None else converted[k]
            if stream.measure == "hidden-state error":
                hidden = states.data[i].float()
                reference = hidden if k is None else reference
                error = (hidden - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-12)
                similar = torch.nn.functional.cosine_similarity(hidden, reference, dim=-1)
                found = (error.sum().item(), similar.sum().item())
            else:
                logits = stream.head_once(sequence, states.data[i : i + 1]).logits[0].float()
                best = logits.argmax(-1)
                reference = best if k is None else reference
                loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum", ignore_index=-100)
                found = (loss.item(), (best == reference)[wanted != -100].sum().item())
            sums[domains[i], place] += torch.tensor(found, dtype=torch.float64)
        scored[domains[i]] += tokens.shape[1] if stream.measure == "hidden-state error" else int((wanted != -100).sum())
    total(sums, scored)
    tables = {}
    for number, name in enumerate(names):
        count = max(1.0, scored[number].item())
        values = [_value(stream.measure, nats / count) for nats in sums[number, :, 0].tolist()]
        rows = [
            QualityRow(
                top_k=k,
                active=active[k],
                value=value,
                ratio=value / values[0] if values[0] else None,
                agreement=agreed / count,
                ffn_flops=flops[k],
            )
            for k, value, agreed in zip(keys[1:], values[1:], sums[number, 1:, 1].tolist(), strict=True)
        ]
        tables[name] = Quality(stream.measure, values[0], int(count), rows)
    first, *others = names
    tables[first].domains = {name: tables[name] for name in others} or None
    return tables[first]


def _value(measure: str, mean: float) -> float:
    return math.exp(min(mean, 700.0)) if measure == "perplexity" else mean


def next_token_labels(tokens: torch.Tensor) -> torch.Tensor:
    """Each place predicts the token after it; the last one is not scored."""
    return torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], -100)], dim=1)
