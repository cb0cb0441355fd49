"""Sparse kernels of emoe. `emoe_kernels.experts.expert_ffn` is the sparse FFN; `use` chooses who computes it."""

from .dispatch import use

__all__ = ["use"]
