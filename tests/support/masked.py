"""An independent statement of what a converted model must compute: the stock dense model with neurons masked.

Nothing of `emoe.modeling` is used here: labels come from partition.safetensors, logits are computed anew in fp64.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from emoe.families import FAMILIES


def labels_of(folder: Path) -> dict[int, torch.Tensor]:
    """Expert of each original neuron, by layer."""
    return {int(name.split(".")[1]): t.long() for name, t in load_file(folder / "partition.safetensors").items()}


def gate_tables(folder: Path) -> dict[str, torch.Tensor]:
    """Every router buffer in the checkpoint."""
    tables = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tables |= {n: t for n, t in load_file(shard).items() if ".router." in n}
    return tables


class MaskedDense:
    """Hooks on a stock model that zero the neurons of unchosen experts, in the model's original neuron order."""

    def __init__(self, model, model_type: str, folder: Path, gate: str, experts: int, top_k: int) -> None:
        self.spec, self.gate, self.experts, self.top_k = FAMILIES[model_type], gate, experts, top_k
        base = getattr(model, model.base_model_prefix, model)
        layers = base.get_submodule(self.spec.layers)
        names = {id(module): name for name, module in model.named_modules()}
        tables = gate_tables(folder)
        self.handles = []
        for index, labels_F in labels_of(folder).items():
            layer = layers[index]
            holder = layer.get_submodule(self.spec.ffn) if self.spec.ffn else layer
            path = names[id(holder)]
            own = {n.rsplit(".", 1)[1]: t for n, t in tables.items() if n.rsplit(".router.", 1)[0] == path}
            self._attach(holder, labels_F, own)

    def _attach(self, holder, labels_F, table) -> None:
        key, down = holder.get_submodule(self.spec.key), holder.get_submodule(self.spec.down)
        state = {}

        def see_input(_, args):
            x = args[0].double()
            if self.gate == "average-key":
                weight = key.weight.detach().double()
                keys_FD = (weight.T if self.spec.transposed else weight)[: len(labels_F)]
                mean_ED = torch.stack([keys_FD[labels_F == e].mean(0) for e in range(self.experts)])
                state["logits"] = x @ mean_ED.T
            elif self.gate == "discriminant":
                state["logits"] = x @ table["weight"].double().T + table["bias"].double()

        def mask(_, args):
            h = args[0]
            logits = state.get("logits")
            if self.gate == "representative":
                order = torch.argsort(labels_F, stable=True)
                logits = h[..., order[table["neuron"]]].double().abs() * table["scale"].double()
            least = most = self.top_k
            if "bounds" in table:  # at least, at most, and between them what exceeds the threshold
                least, most = table["bounds"][self.top_k - 1].tolist()
            best = logits.topk(most)
            wanted = torch.arange(most) < least
            if least < most:
                wanted = wanted | (best.values > table["threshold"][self.top_k - 1])
            chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(
                -1, best.indices, wanted.expand(best.indices.shape)
            )
            return (torch.where(chosen[..., labels_F], h, 0), *args[1:])

        self.handles += [key.register_forward_pre_hook(see_input), down.register_forward_pre_hook(mask)]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
