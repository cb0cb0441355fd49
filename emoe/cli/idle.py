"""Settings that were given and would be ignored: whoever gives one expects something of it."""

from __future__ import annotations

from emoe.config import COUNTING, FITTING, ExtendConfig, PruneConfig, Settings, TuneConfig, flag_of
from emoe.errors import UserError

READING = frozenset({"tokens", "sequence_length", "batch_sequences"})
"""How text is read: scripts may give that to all their calls alike."""


def refuse_idle(settings: Settings) -> None:
    """Raise `UserError` for the first setting, given by flag or file, that has no effect beside the others."""
    for key, why in _idle(settings).items():
        if key in settings.model_fields_set:
            raise UserError(f"{flag_of(key)}: has no effect {why}; leave it out")


def _idle(settings: Settings) -> dict[str, str]:
    """Setting without effect → why."""
    if isinstance(settings, ExtendConfig) and not (settings.text or settings.old_text):
        return dict.fromkeys(sorted(FITTING - READING), "without --text and --old-text, on which gates are fitted")
    if isinstance(settings, TuneConfig) and settings.train != "lora":
        return {"lora_rank": f"with --train {settings.train}"}
    if isinstance(settings, PruneConfig):
        return _idle_in_pruning(settings)
    return {}


def _idle_in_pruning(settings: PruneConfig) -> dict[str, str]:
    if settings.remove:
        return dict.fromkeys(sorted(COUNTING - READING | {"scope", "floor"}), f"with --remove {settings.remove}")
    if settings.method != "use":
        idle = {"count", "normalise"} if settings.method == "magnitude" else COUNTING - READING
        rankless = set() if settings.method == "random" else {"scope", "floor"}
        return dict.fromkeys(sorted(idle | rankless), f"with --method {settings.method}")
    if settings.threshold is not None:
        return {"scope": "with --threshold, which every module is held against"}
    if settings.scope == "layer":
        return {"normalise": "with --scope layer, where a module is compared with its own layer's"}
    return {}
