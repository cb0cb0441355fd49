"""Run something when a module is imported, now if it is already there.

``import emoe`` promises that the Auto classes know converted models. Registering with transformers costs its import,
seconds that ``emoe --help`` must not pay; so we register the moment somebody imports transformers' Auto classes.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module as the other finders do, and appends ``action`` to its execution."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(self, fullname, path, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            self.action()

        spec.loader.exec_module = exec_module
        return spec


def after_import(name: str, action: Callable[[], None]) -> None:
    """Call ``action`` once, right after the module ``name`` has been imported."""
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _AfterImport(name, action))
