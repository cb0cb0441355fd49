"""Ways out of a converted checkpoint. A further format is one new file and one line here."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe.checkpoint.given import require_folder
from emoe.errors import UserError, nearest

if TYPE_CHECKING:
    from emoe.exporting.spec import Format

FORMATS = {
    "dense": "the source's own architecture, neurons in their original order; exact",
    "granitemoe": "GraniteMoE, all layers, average-key or softmax gate; exact in float32",
    "gpt_oss": "GPT-OSS, all layers, any linear gate, compensation; exact in float32",
    "qwen2_moe": "Qwen2-MoE, some layers or all, shared experts; near with average-key gates, exact with softmax ones",
    "mixtral": "Mixtral, all layers; near with average-key gates and --approximate, exact with softmax ones",
    "gguf": "GGUF of the dense model for llama.cpp; exact",
}
"""Name, which is also that of the file in this folder → what it is."""

ELEMENT_TYPES = ("float32", "bfloat16", "float16")
"""What weights may be written in, as torch calls them."""

VERIFY_TOKENS = 4096
"""Tokens of real text on which an export is compared with its source, unless told otherwise."""


def get(name: str) -> Format:
    """The `Format` of a name.

    Raises:
        UserError: no format of that name.
    """
    _check_name(name)
    return importlib.import_module(f"emoe.exporting.{name}").FORMAT


def _check_name(name: str) -> None:
    if name not in FORMATS:
        raise UserError(f"--to: unknown format '{name}'{nearest(name, FORMATS)}. Known formats: {', '.join(FORMATS)}")


def export(
    model: str | Path,
    output: str | Path,
    to: str = "dense",
    *,
    pad: bool = False,
    fix_k: int | None = None,
    approximate: bool = False,
    dtype: str | None = None,
    overwrite: bool = False,
    verify_tokens: int = VERIFY_TOKENS,
    verify_text: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write a converted checkpoint in another format, load it with stock transformers and compare the two.

    Args:
        model: folder of a converted checkpoint.
        output: folder to write; must not exist unless `overwrite` is given.
        to: a key of `FORMATS`.
        pad: add neurons of zeros where layers differ in width after pruning.
        fix_k: route every token of every layer to so many experts, where the model itself routes by need.
        approximate: write formats, too, that cannot choose as the model does, and added experts without their gates.
        dtype: "float32", "bfloat16" or "float16"; None for the checkpoint's own.
        overwrite: replace an earlier export or other checkpoint of ours, once the new one is complete.
        verify_tokens: tokens of text to compare on, at least 2; 0 for no comparison.
        verify_text: where that text comes from, as for ``emoe convert --calibration``; None for the built-in.
        progress: called with stage, done, total.
        say: called with the cost, a line, before anything is written.

    Returns:
        The report: format, dtype, bytes, exactness, "comparisons", and what the format itself tells ("layers",
        "identical").

    Raises:
        UserError: unknown format, not a converted checkpoint, a model that the format cannot represent, an output in
            the way, no room, or an export that does not compute what its source does.
    """
    _check_name(to)
    if dtype is not None and dtype not in ELEMENT_TYPES:
        raise UserError(f"--dtype: unknown element type '{dtype}'; known: {', '.join(ELEMENT_TYPES)}")
    if verify_tokens < 0 or verify_tokens == 1:
        raise UserError(f"--verify-tokens: {verify_tokens} must be 0, or 2 or more")
    model, output = Path(os.path.expanduser(model)), Path(os.path.expanduser(output))
    require_folder(model)
    from emoe.checkpoint.companions import check_companions
    from emoe.conversion.workspace import Workspace

    workspace = Workspace(output, model, resume=False, overwrite=overwrite)
    workspace.check_early()
    from emoe.exporting.run import run
    from emoe.exporting.source import Source, element_type

    source = Source(model, pad=pad, fix_k=fix_k, dtype=element_type(dtype), approximate=approximate)
    check_companions(model)
    progress, say = progress or (lambda *_: None), say or (lambda _: None)
    return run(source, get(to), workspace, verify_tokens, verify_text, progress, say)
