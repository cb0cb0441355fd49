"""Flags made from settings: each field of a settings class is a flag of the same name, with the same help."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from emoe.config import ConvertConfig, Settings, flag_of
from emoe.errors import UserError

_FIRST = ("model", "experts", "output", "preset", "top_k", "layers", "split", "gate", "calibration")


def _flag(name: str, settings: type[Settings]) -> inspect.Parameter:
    field = settings.model_fields[name]
    kind: Any = field.annotation
    choices = _choices(kind)
    if kind in (int | None, float | None):
        kind = int if kind == (int | None) else float
    elif kind not in (int, float, bool, list[str], list[float]):
        kind = str
    metavar = {bool: None, int: "N", float: "X", list[float]: "X,X"}.get(kind, "|".join(choices) or "TEXT")
    if kind == list[float]:  # with commas or as several flags; `merge_settings` takes them apart
        kind = list[str]
    default = "" if field.default in (None, "", False, []) else f" [default: {_shown(field.default)}]"
    # Only what is on by default has a --no- form: of the rest, files may turn it on, and a flag can only do the same.
    names = f"{flag_of(name)}/--no-{flag_of(name)[2:]}" if field.default is True else flag_of(name)
    option = typer.Option(names, help=(field.description or "") + default, show_default=False, metavar=metavar)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _choices(kind: Any) -> list[str]:
    """The values of a Literal, or of one that may be None."""
    values = [value for part in (kind, *get_args(kind)) if get_origin(part) is Literal for value in get_args(part)]
    return [str(value) for value in values]


def _shown(default: Any) -> str:
    return ", ".join(map(str, default)) if isinstance(default, list) else str(default)


def speaks() -> bool:
    """Whether this process is the one of several that prints."""
    return os.environ.get("RANK", "0") == "0"


def with_settings(
    leave_out: frozenset[str] = frozenset(), settings: type[Settings] = ConvertConfig
) -> Callable[[Callable], Callable]:
    """Give a command every setting as a flag; the function receives those that were typed as ``flags: dict``.

    Of several processes all but one get ``quiet`` and no ``json_output``.
    """

    def decorate(function: Callable) -> Callable:
        hints = get_type_hints(function, include_extras=True)
        parameters = inspect.signature(function).parameters.values()
        own = [p.replace(annotation=hints[p.name]) for p in parameters if p.name != "flags"]
        first = [name for name in _FIRST if name in settings.model_fields]
        names = [*first, *(name for name in settings.model_fields if name not in first)]
        options = [_flag(name, settings) for name in names if name not in leave_out]

        def command(**given: Any) -> Any:
            flags = {p.name: given.pop(p.name) for p in options}
            if not speaks():
                given |= {"quiet": True, "json_output": False}
            return function(flags={k: v for k, v in flags.items() if v is not None and v != []}, **given)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__signature__ = inspect.Signature(
            [*options, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]
        )
        command.__annotations__ = {p.name: p.annotation for p in command.__signature__.parameters.values()}
        return command

    return decorate


ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings; flags win over it.")]


def _enough(resamples: int) -> int:
    if resamples < 100:
        raise UserError(f"--resamples: must be at least 100, got {resamples}")
    return resamples


Resamples = Annotated[
    int, typer.Option("--resamples", callback=_enough, help="Draws of the comparison's bootstrap and tests.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no tables.")]
