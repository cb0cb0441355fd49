"""Gates from cluster centroids. A further gate is one new file, one line here, a branch of `routing_emoe.Router`."""

from __future__ import annotations

from emoe.errors import UserError, nearest

NAMES = ("discriminant", "representative", "average-key")

SOFTMAX = "softmax"
"""The gate that `emoe recover --gates softmax` trains; see `emoe.finetuning.softmax`."""


def get(name: str, measuring: bool = False):
    """The `GateMethod` of a name; `oracle` only for measuring.

    Raises:
        UserError: no gate of that name.
    """
    if name == "oracle" and not measuring:
        raise UserError("--gate: 'oracle' looks at the answer; it serves measurement only, choose a real gate")
    if name not in (*NAMES, "oracle"):
        raise UserError(f"--gate: unknown gate '{name}'{nearest(name, NAMES)}. Known gates: {', '.join(NAMES)}")
    from emoe.gating import average_key, discriminant, oracle, representative

    return {m.METHOD.name: m.METHOD for m in (average_key, discriminant, representative, oracle)}[name]


def tables_of(name: str) -> tuple[str, ...]:
    """Tables of the router of a checkpoint's gate that can be learned, by name; none of a gate that is not ours."""
    if name == SOFTMAX:
        return ("weight",)
    return get(name).tables if name in NAMES else ()
