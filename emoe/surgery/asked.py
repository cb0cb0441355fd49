"""Settings of `emoe prune` and `emoe extend` that contradict each other or ask for nothing: seen without the model."""

from __future__ import annotations

from emoe.checkpoint.given import WITH_EXPERTS, given_model
from emoe.checkpoint.limits import LARGEST
from emoe.config import ExtendConfig, PruneConfig
from emoe.errors import UserError, shortened


def check_pruning(config: PruneConfig) -> None:
    """Raise `UserError` for what `emoe prune` cannot do to any model."""
    given_model(config.model, WITH_EXPERTS)
    ways = [config.keep is not None, config.threshold is not None, config.remove is not None]
    if sum(ways) != 1:
        raise UserError("--keep: give exactly one of --keep, --threshold and --remove")
    if config.remove:
        if config.method != "use":
            raise UserError("--method: --remove takes back what was added, whatever the method; drop one of them")
        return
    if config.text and config.task:
        raise UserError("--task: use is counted on --text or on a task's texts; drop one of them")
    counts = config.method in ("use", "magnitude")
    if counts and not (config.text or config.task):
        raise UserError("--text: missing; name the text (or --task) on which use is counted")
    if not counts and config.threshold is not None:
        raise UserError(f"--threshold: --method {config.method} counts nothing; give --keep")
    if config.method == "magnitude" and config.threshold is not None:
        raise UserError("--threshold: --method magnitude keeps a fraction; give --keep")
    if config.method == "magnitude" and config.top_k is not None:
        raise UserError("--top-k: --method magnitude writes a dense model, which has no K; leave it out")
    if config.task:
        from emoe import tasks

        tasks.get(config.task)


def check_extension(config: ExtendConfig) -> None:
    """Raise `UserError` for what `emoe extend` cannot do to any model."""
    given_model(config.model, WITH_EXPERTS)
    if not (config.experts or config.attention):
        raise UserError("--experts: nothing to add; give --experts or --attention, at least 1")
    if bool(config.text) != bool(config.old_text):
        missing = "--old-text" if config.text else "--text"
        raise UserError(f"{missing}: missing; gates are fitted on the text to open on and on text to stay shut on")
    for flag, number in (("--experts", config.experts), ("--attention", config.attention)):
        if number > LARGEST["num_experts"]:
            raise UserError(f"{flag}: {shortened(number)} is more than any model has; at most {LARGEST['num_experts']}")
