"""Experts that a gate never chooses."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file


def starve(folder: Path, experts: list[int], layers: list[int]) -> None:
    """Make a discriminant gate never choose these experts in these layers, whatever the token."""
    for path in folder.glob("model*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("router.bias") and any(f".{layer}." in name for layer in layers):
                tensors[name][experts] = -1e4
        save_file(tensors, path, metadata={"format": "pt"})
