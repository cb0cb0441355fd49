"""``partition.safetensors``: which expert each neuron of the source belongs to, and what it was made from.

``layers.{i}.labels`` is int32 of shape (F,): the expert of each *original* neuron. The converted weights hold the
neurons sorted by (expert, original index), so the labels alone lead back to the source's order.
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


def order_of(labels_F: torch.Tensor) -> torch.Tensor:
    """Original indices in their converted order: ``converted = source[order]``, (F,) int64."""
    return torch.argsort(labels_F.long(), stable=True)


def inverse_of(order_F: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes ``order_F``, (F,) int64."""
    inverse_F = torch.empty_like(order_F)
    inverse_F[order_F] = torch.arange(len(order_F))
    return inverse_F


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
        """Read and check: every layer's labels must be a partition into equal parts.

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
            check_labels(labels_F, experts, f"{path}, layer {index}")
        return cls(experts, labels, digests, facts)


def check_labels(labels_F: torch.Tensor, num_experts: int, where: str) -> None:
    """Raise `UserError` unless ``labels_F`` gives every one of ``num_experts`` experts equally many neurons."""
    valid = labels_F.ndim == 1 and labels_F.dtype == torch.int32 and 1 <= num_experts <= len(labels_F)
    valid = valid and len(labels_F) % num_experts == 0
    if valid and ((labels_F < 0) | (labels_F >= num_experts)).any():
        valid = False
    if not valid or (torch.bincount(labels_F.long(), minlength=num_experts) != len(labels_F) // num_experts).any():
        raise UserError(f"{where}: labels are not {num_experts} equal parts; convert the model again")
