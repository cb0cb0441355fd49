"""Linear layers of experts, into and out of (N, K, S): `expert_linear`, `expert_combine`."""

from .op import expert_combine, expert_linear

__all__ = ["expert_combine", "expert_linear"]
