"""The split methods by name. A new method is one file and one line here."""

from __future__ import annotations

from emoe.clustering.coactivation import CoActivation
from emoe.clustering.contiguous import Contiguous
from emoe.clustering.graph import Graph
from emoe.clustering.random_split import Random
from emoe.clustering.spec import SplitMethod
from emoe.clustering.weights import Weights
from emoe.errors import UserError, nearest

METHODS: tuple[SplitMethod, ...] = (Weights(), CoActivation(), Graph(), Random(), Contiguous())


def available() -> tuple[str, ...]:
    """Names of the split methods, in the order in which help texts list them."""
    return tuple(method.name for method in METHODS)


def get(name: str) -> SplitMethod:
    """The method called ``name``; a `UserError` with the known names and the nearest one otherwise."""
    for method in METHODS:
        if method.name == name:
            return method
    raise UserError(f"--split {name} is unknown (known: {', '.join(available())}){nearest(name, available())}")
