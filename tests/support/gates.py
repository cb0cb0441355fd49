"""The gates of models that surgery is for, loaded or on disk."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from emoe.checkpoint.digests import write_digests


def gates_of(model: nn.Module) -> dict[str, nn.Module]:
    """Of a loaded converted model or ModuleFormer, by name of the set."""
    if hasattr(model, "sparse_ffns"):
        return {f"{layer}.ffn": ffn.router for layer, ffn in model.sparse_ffns().items()}
    found = {}
    for layer, block in enumerate(model.transformer.h):
        found |= {f"{layer}.attention": block.attn.q_proj.gate, f"{layer}.ffn": block.mlpf.gate}
    return found


def starve(folder: Path, experts: list[int], layers: list[int]) -> None:
    """Make a discriminant gate never choose these experts in these layers, whatever the token."""
    for path in folder.glob("model*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.endswith("router.bias") and any(f".{layer}." in name for layer in layers):
                tensors[name][experts] = -1e4
        save_file(tensors, path, metadata={"format": "pt"})
    write_digests(folder)
