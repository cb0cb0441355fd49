"""From sums over domains to what the report says.

Legend: C domains, E modules of a set, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from emoe.analysis.collect import DomainUse
from emoe.analysis.divergence import distributions, jensen_shannon, kullback_leibler, specialisation
from emoe.surgery.modules import ModuleSet
from emoe.tasks.metrics import perplexity

RANKED = 64
"""Modules and neurons that the ranking lists."""

Example = Callable[[str, int], dict[str, str]]


def describe_domains(use: dict[str, DomainUse]) -> dict[str, dict[str, Any]]:
    """Tokens and loss of each domain; None for the loss of a model that predicts no next token."""
    return {
        name: {
            "tokens": max(found.tokens for found in domain.use.values()),
            "loss": domain.nats / domain.scored if domain.scored else None,
            "perplexity": perplexity(domain.nats, domain.scored) if domain.scored else None,
        }
        for name, domain in use.items()
    }


def findings(sets: list[ModuleSet], use: dict[str, DomainUse], example: Example) -> dict[str, Any]:
    """Frequencies, energies, divergences, ranking and neurons."""
    shares = {found.name: distributions(_table(use, found, "hard")) for found in sets}
    report: dict[str, Any] = {"sets": [_set_row(found, use) for found in sets]}
    report["divergence"] = {
        kind: _divergences([shares[found.name] for found in sets if found.kind == kind])
        for kind in sorted({found.kind for found in sets})
    }
    report["specialised"] = _ranking(sets, use, shares, example)
    neurons = _neurons(sets, use, shares)
    return report | ({"neurons": neurons} if neurons else {})


def _table(use: dict[str, DomainUse], found: ModuleSet, kind: str) -> torch.Tensor:
    return torch.stack([domain.use[found.name].of(kind) for domain in use.values()])


def _set_row(found: ModuleSet, use: dict[str, DomainUse]) -> dict[str, Any]:
    rows: dict[str, Any] = {"set": found.name, "layer": found.layer, "kind": found.kind, "groups": list(found.groups)}
    for kind, label in (("hard", "frequency"), ("probability", "probability"), ("energy", "energy")):
        rows[label] = {
            name: (domain.use[found.name].of(kind) / max(1, domain.use[found.name].tokens)).tolist()
            for name, domain in use.items()
        }
    if not any(map(any, rows["energy"].values())):
        del rows["energy"]
    return rows


def _divergences(shares: list[torch.Tensor]) -> dict[str, Any]:
    """Mean over the layers, and each layer's mean over pairs of domains."""
    kl, js = (torch.stack([measure(p_CE) for p_CE in shares]) for measure in (kullback_leibler, jensen_shannon))
    pairs = max(1, kl.shape[1] * (kl.shape[1] - 1))
    return {
        "kl": kl.mean(0).tolist(),
        "js": js.mean(0).tolist(),
        "kl_by_layer": (kl.sum((1, 2)) / pairs).tolist(),
        "js_by_layer": (js.sum((1, 2)) / pairs).tolist(),
    }


def _ranking(sets, use: dict[str, DomainUse], shares: dict[str, torch.Tensor], example: Example) -> list[dict]:
    """Modules by how much they tell of the domain, the rare ones last."""
    names, rows = list(use), []
    for found in sets:
        told_E, information_E = specialisation(shares[found.name])
        for expert in range(found.count):
            rows.append((information_E[expert].item(), told_E[expert].item(), found.name, expert))
    rows.sort(key=lambda row: (-row[0], row[2], row[3]))
    ranked = []
    for information, told, name, expert in rows[:RANKED]:
        best = names[int(shares[name][:, expert].argmax())]
        row = {"set": name, "expert": expert, "domain": best, "specialisation": told, "information": information}
        row["frequency"] = {n: use[n].use[name].hard_E[expert].item() / max(1, use[n].use[name].tokens) for n in names}
        ranked.append(row | {"examples": _examples(name, expert, use, example)})
    return ranked


def _examples(name: str, expert: int, use: dict[str, DomainUse], example: Example) -> list[dict[str, Any]]:
    """The tokens that activate a module most, over all domains; of equal ones the first."""
    found = []
    for domain, sums in use.items():
        kept = sums.examples[name]
        for score, place in zip(kept.score_EM[expert].tolist(), kept.place_EM[expert].tolist(), strict=True):
            if place >= 0 and score > 0:
                found.append((score, domain, place))
    found.sort(key=lambda row: -row[0])
    chosen: dict[str, dict[str, Any]] = {}
    most = max((sums.most_examples for sums in use.values()), default=0)
    for score, domain, place in found:
        row = example(domain, place)
        if row["token"] not in chosen and len(chosen) < most:
            chosen[row["token"]] = row | {"share": score}
    return list(chosen.values())


def _neurons(sets, use: dict[str, DomainUse], shares: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """Neurons by what they tell of the domain, and how much of that their experts keep.

    A neuron's use is its share of Σ h² in the layer. Grouping can only lose information (the data-processing
    inequality); random groups lose nearly all, groups of neurons that serve the same domains lose little.
    """
    names, rows, layers = list(use), [], []
    for found in sets:
        if any(found.name not in domain.neurons for domain in use.values()):
            continue
        energy_CF = torch.stack([domain.neurons[found.name] for domain in use.values()])
        p_CF = energy_CF / energy_CF.sum(1, keepdim=True).clamp_min(1e-300)
        told_F, information_F = specialisation(p_CF)
        p_CE = p_CF.unflatten(1, (found.count, found.size)).sum(2)
        kept = specialisation(p_CE)[1].sum().item()
        whole = information_F.sum().item()
        layers.append({"set": found.name, "neurons": whole, "experts": kept, "kept": kept / max(whole, 1e-30)})
        for neuron in information_F.topk(min(8, len(information_F))).indices.tolist():
            row = {"set": found.name, "neuron": neuron, "expert": neuron // found.size}
            row |= {"domain": names[int(p_CF[:, neuron].argmax())], "specialisation": told_F[neuron].item()}
            rows.append(row | {"information": information_F[neuron].item()})
    rows.sort(key=lambda row: -row["information"])
    return {"ranked": rows[:RANKED], "layers": layers} if layers else None
