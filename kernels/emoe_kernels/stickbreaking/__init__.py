"""Stick-breaking attention: `stick_breaking_attention`."""

from .op import StickBreaking, stick_breaking_attention

__all__ = ["StickBreaking", "stick_breaking_attention"]
