"""What goes is what is used least: use and strength counted a second time, token by token, in plain torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from support.gates import gates_of, starve
from support.tiny import tiny_checkpoint

import emoe
from emoe.surgery.modules import anatomy_of
from emoe.surgery.usage import count_use, read_blocks


def blocks_of(folder: Path, text_file: Path) -> torch.Tensor:
    """The blocks that the flags of the fixture `text` say."""
    return read_blocks(folder, [str(text_file)], length=64, tokens=2048, seed=0, flag="--text")


def kept_in(folder: Path) -> dict[str, list[int]]:
    return json.loads((folder / "emoe_prune.json").read_text())["kept"]


def energies(ffn, x_ND: torch.Tensor) -> torch.Tensor:
    """Squared lengths of what each expert of a Llama's FFN gives, (N, E)."""
    h_NF = torch.nn.functional.silu(x_ND @ ffn.gate_proj.weight.T) * (x_ND @ ffn.up_proj.weight.T)
    parts = zip(h_NF.chunk(8, dim=1), ffn.down_proj.weight.chunk(8, dim=1), strict=True)
    return torch.stack([(h_NS @ down_DS.T).square().sum(1) for h_NS, down_DS in parts], 1)


@torch.no_grad()
def used(folder: Path, blocks_BT: torch.Tensor, kind: str) -> dict[str, list[float]]:
    """Sums over the tokens, of each module of each set."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    sums: dict[str, torch.Tensor] = {}

    def count(name: str):
        def hook(gate, arguments, routing) -> None:
            logits_NE = routing.logits_NE.double()
            sum_E = sums.setdefault(name, torch.zeros(logits_NE.shape[1], dtype=torch.float64))
            if kind == "energy":
                energy_NE = energies(arguments[1], arguments[0]).double()
                sum_E += (energy_NE / energy_NE.sum(1, keepdim=True)).sum(0)
                return
            exponents_NE = (logits_NE - logits_NE.max(1, keepdim=True).values).exp()
            rows = zip(
                routing.experts_NK.tolist(), (exponents_NE / exponents_NE.sum(1, keepdim=True)).tolist(), strict=True
            )
            for chosen, p_E in rows:
                for expert in chosen:
                    if expert >= 0:  # else an unused slot
                        sum_E[expert] += 1 if kind == "hard" else p_E[expert]

        return hook

    for name, gate in gates_of(model).items():
        gate.register_forward_hook(count(name))
    model(blocks_BT)
    return {name: sum_E.tolist() for name, sum_E in sums.items()}


def best_half(use: dict[str, list[float]]) -> dict[str, list[int]]:
    """Of the modules of each kind over all layers, by their use over the layer's largest."""
    kept = {name: [] for name in use}
    for kind in {name.split(".")[1] for name in use}:
        alike = [
            (-round(count / max(counts), 9), int(name.split(".")[0]), module, name)
            for name, counts in use.items()
            if name.endswith(kind)
            for module, count in enumerate(counts)
        ]
        for _, _, module, name in sorted(alike)[: len(alike) // 2]:
            kept[name].append(module)
    return {name: sorted(modules) for name, modules in kept.items()}


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        *(("converted_llama", kind) for kind in ("probability", "hard", "energy")),
        *(("tiny_moduleformer", kind) for kind in ("probability", "hard")),
    ],
)
def test_the_most_used_half_stays(model, kind, run, text, text_file, request):
    folder = request.getfixturevalue(model)
    blocks_BT = blocks_of(folder, text_file)
    expected = used(folder, blocks_BT, kind)
    loaded = transformers.AutoModel.from_pretrained(folder).eval()
    found = count_use(anatomy_of(folder), loaded, blocks_BT, kind=kind, batch=4, progress=lambda *_: None)
    assert found.keys() == expected.keys()
    for name, counts in expected.items():
        assert found[name].tolist() == pytest.approx(counts, rel=1e-4, abs=1e-3)
    small = run("prune", folder, "small", *text, "--keep", 0.5, "--floor", 0, "--count", kind)
    assert kept_in(small) == best_half(expected)


@pytest.mark.parametrize("count", ["probability", "hard"])
def test_what_is_never_chosen_goes_first(count, converted_llama, run, text, tmp_path):
    folder = Path(shutil.copytree(converted_llama, tmp_path / "starved"))
    starve(folder, [1, 6], [0, 2])
    flags = (*text, "--count", count)
    fed, few = list(range(8)), [0, 2, 3, 4, 5, 7]
    by_layer = kept_in(run("prune", folder, "by layer", *flags, "--keep", 0.75, "--scope", "layer"))
    assert (by_layer["0.ffn"], by_layer["2.ffn"]) == (few, few)
    assert kept_in(run("prune", folder, "by model", *flags, "--keep", 28 / 32)) == {
        **{"0.ffn": few, "1.ffn": fed, "2.ffn": few, "3.ffn": fed},
    }


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])  # gated, fused, transposed
def test_magnitude_takes_the_weakest_neurons_out(family, settings, run, text, text_file, tmp_path):
    """The stock model whose weakest neurons by ‖w_down‖·mean|h| give nothing is the model without them."""
    dense = tiny_checkpoint(tmp_path / "dense", family)
    emoe.convert(str(dense), output=tmp_path / "moe", **settings)
    small = run("prune", tmp_path / "moe", "small", *text, "--keep", 0.5, "--method", "magnitude")
    model = transformers.AutoModelForCausalLM.from_pretrained(dense).eval()
    outputs = [m for name, m in model.named_modules() if name.endswith(("mlp.down_proj", "mlp.c_proj"))]
    seen = {}
    hooks = [
        m.register_forward_pre_hook(lambda m, inputs: seen.update({m: inputs[0].abs().mean((0, 1))})) for m in outputs
    ]
    with torch.no_grad():
        model(blocks_of(dense, text_file))
        for hook, output in zip(hooks, outputs, strict=True):
            hook.remove()
            rows_FD = output.weight if family == "gpt2" else output.weight.T
            strength_F = rows_FD.norm(dim=1) * seen[output]
            rows_FD[strength_F.argsort()[:24]] = 0
        tokens = torch.randint(5, 96, (3, 20), generator=torch.Generator().manual_seed(0))
        found = transformers.AutoModelForCausalLM.from_pretrained(small).eval()(tokens).logits
        torch.testing.assert_close(found, model(tokens).logits, rtol=0, atol=1e-4)


def test_random_pruning_depends_on_the_seed_alone(converted_llama, run):
    flags = ("--method", "random", "--keep", 0.5, "--scope", "layer")
    kept = [
        kept_in(run("prune", converted_llama, f"seed {number}", *flags, "--seed", seed))
        for number, seed in enumerate((0, 0, 1))
    ]
    assert kept[0] == kept[1] != kept[2]
    assert {len(modules) for found in kept for modules in found.values()} == {4}
    assert len({tuple(modules) for modules in kept[0].values()}) > 1  # layers are drawn apart
