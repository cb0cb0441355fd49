"""Sparse expert FFN, gated or plain: `expert_ffn`."""

from .op import ACTIVATIONS, expert_ffn

__all__ = ["ACTIVATIONS", "expert_ffn"]
