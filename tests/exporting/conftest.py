"""Converted models for every kind of routing, made once a session."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from support.tiny import tiny_checkpoint


@pytest.fixture(scope="session")
def converted(settings, tmp_path_factory) -> Callable[..., Path]:
    """``converted(family="llama", shape={…}, **settings)`` → folder of a tiny converted model, always the same one."""
    import emoe

    folder = tmp_path_factory.mktemp("exporting")

    @functools.cache
    def dense(family: str, shape: tuple) -> Path:
        return tiny_checkpoint(folder / f"dense-{len(list(folder.iterdir()))}", family, **dict(shape))

    @functools.cache
    def make(family: str, shape: tuple, given: tuple) -> Path:
        output = folder / f"converted-{len(list(folder.iterdir()))}"
        emoe.convert(str(dense(family, shape)), output=output, **(settings | dict(given)))
        return output

    return lambda family="llama", shape=None, **given: make(
        family, tuple(sorted((shape or {}).items())), tuple(sorted(given.items()))
    )
