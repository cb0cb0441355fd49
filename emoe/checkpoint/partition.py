"""``partition.safetensors``: which expert each neuron of the source belongs to, and what it was made from.

``layers.{i}.labels`` is int32 of shape (F,): the expert of each *original* neuron, `GONE` where its expert was pruned.
The converted weights hold the neurons sorted by (expert, original index), so the labels alone lead back to the source's
order. Neurons that were added come behind those and have no label.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from emoe.checkpoint.writer import save_tensors
from emoe.errors import UserError

NAME = "partition.safetensors"

GONE = -1
"""Label of a neuron that is no longer there."""


def order_of(labels_F: torch.Tensor) -> torch.Tensor:
    """Original indices in their converted order: ``converted = source[order]``, (F,) int64; without what is gone."""
    return torch.argsort(labels_F.long(), stable=True)[int((labels_F == GONE).sum()) :]


def inverse_of(order_F: torch.Tensor) -> torch.Tensor:
    """Places in the converted order of the neurons that are left, in the source's order, int64."""
    return torch.argsort(order_F)


def keep_experts(labels_F: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """Labels after pruning all experts but ``kept`` (ascending), which are numbered anew from 0."""
    places_E = torch.full((max(int(labels_F.max()) + 1, 1 + max(kept, default=0)),), GONE, dtype=labels_F.dtype)
    places_E[kept] = torch.arange(len(kept), dtype=labels_F.dtype)
    return torch.where(labels_F == GONE, GONE, places_E[labels_F.long().clamp_min(0)])


def digest_ffn(roles: dict[str, tuple[str, str]], tensors: dict[str, torch.Tensor]) -> str:
    """Hex sha256 over the tensors of an FFN in order of their (role, kind), whatever their names."""
    digest = hashlib.sha256()
    for name, role in sorted(roles.items(), key=lambda item: item[1]):
        digest.update("/".join(role).encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass
class Partition:
    """Labels by layer index, with the digest of the FFN weights that each was made from and facts about the making."""

    num_experts: int
    """Equal parts that each layer was split into."""
    labels: dict[int, torch.Tensor] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write atomically."""
        tensors = {f"layers.{i}.labels": labels.to(torch.int32) for i, labels in sorted(self.labels.items())}
        digests = {str(i): self.digests[i] for i in sorted(self.digests)}
        facts = {"num_experts": self.num_experts, "digests": digests, **self.facts}
        # One entry: safetensors writes several in an order that changes from run to run.
        save_tensors(path, tensors, {"emoe": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path) -> Partition:
        """Read and check: every layer's labels must be a partition into equal parts, or what pruning left of one.

        Raises:
            UserError: the file is missing, damaged, or its labels are not equal parts.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["emoe"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            experts = int(facts.pop("num_experts"))
            digests = {int(i): str(value) for i, value in facts.pop("digests").items()}
            labels = {int(name.split(".")[1]): tensor for name, tensor in tensors.items()}
        except (SafetensorError, OSError, KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
            raise UserError(f"{path} is missing or damaged ({error}); convert the model again") from None
        except RecursionError:
            raise UserError(f"{path} is nested too deeply; do not trust it") from None
        if digests.keys() != labels.keys():
            raise UserError(f"{path} has labels and digests of different layers; convert the model again")
        for index, labels_F in labels.items():
            check_labels(labels_F, experts, f"{path}, layer {index}", pruned=True)
        return cls(experts, labels, digests, facts)


def check_labels(labels_F: torch.Tensor, num_experts: int, where: str, *, pruned: bool = False) -> None:
    """Raise `UserError` unless ``labels_F`` gives every one of ``num_experts`` experts equally many neurons.

    Args:
        pruned: some of the parts may be gone, the others numbered without gaps.
    """
    valid = labels_F.ndim == 1 and labels_F.dtype == torch.int32 and 1 <= num_experts <= len(labels_F)
    valid = valid and len(labels_F) % num_experts == 0
    if valid and ((labels_F < (GONE if pruned else 0)) | (labels_F >= num_experts)).any():
        valid = False
    if valid:
        sizes_E = torch.bincount(labels_F[labels_F != GONE].long())
        left = len(sizes_E) if pruned else num_experts
        valid = len(sizes_E) == left and bool((sizes_E == len(labels_F) // num_experts).all())
    if not valid:
        raise UserError(f"{where}: labels are not {num_experts} equal parts; convert the model again")
