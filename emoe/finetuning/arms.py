"""The methods that are compared, as data. An arm is nothing but a line here: what it does not name is the same for all.

Source: Qiu, Huang, Fu (NAACL 2024, arXiv 2310.10908): EMoE, EMoE-learn, GMoE and the choices of sec. 5.2. The dropout
control is ours: EMoE training hides a share of neurons from each token, and so does dropout.
"""

from __future__ import annotations

from dataclasses import dataclass

from emoe.errors import UserError, nearest


@dataclass(frozen=True)
class Arm:
    """One method."""

    name: str
    summary: str
    sparse: bool = True
    """Trains with K of E experts; otherwise with all of them, which is the dense model."""
    gate: str | None = None
    """Gate to put in place of the converted model's; None keeps that."""
    routing: str | None = None
    """Value of ``config.emoe_routing`` to put in place of the converted model's; None keeps that."""
    dropout: bool = False
    """Neurons of the same layers are dropped at random in training, as many as K of E experts leave out."""
    copied: bool = False
    """Experts are copies of the whole FFN: parameters are added."""

    @property
    def learns_gate(self) -> bool:
        """Whether gradients reach the gate."""
        return self.gate == "cosine"

    @property
    def reading(self) -> str:
        """The reading that is the same as the one it is trained in."""
        return "emoe" if self.sparse else "dense"


ARMS: dict[str, Arm] = {
    arm.name: arm
    for arm in (
        Arm("vanilla", "dense fine-tuning", sparse=False),
        Arm("dropout", "dense, with dropout on the neurons of the same layers (control)", sparse=False, dropout=True),
        Arm("emoe", "the experts of largest logit; the gate follows the weights"),
        Arm("emoe-learn", "a trained cosine gate over the same experts", gate="cosine", routing="top-k"),
        Arm(
            "gmoe",
            "a trained cosine gate over copies of the whole FFN; adds parameters",
            gate="cosine",
            routing="top-k",
            copied=True,
        ),
        Arm("random", "experts drawn by a hash of the token's logits (ablation)", routing="random"),
        Arm("bottom-k", "the experts of smallest logit (ablation)", routing="bottom-k"),
    )
}


def get(name: str) -> Arm:
    """The arm of a name; raises `UserError` when there is none."""
    if name not in ARMS:
        raise UserError(f"--method: unknown method '{name}'{nearest(name, ARMS)}. Known methods: {', '.join(ARMS)}")
    return ARMS[name]
