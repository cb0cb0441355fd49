"""How much each module is used on text.

Legend: N tokens, F neurons, E modules of a set, K modules chosen.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from emoe.calibration.text import load_blocks, read_tokenizer
from emoe.checkpoint.converted import read_converted
from emoe.config import PruneConfig
from emoe.errors import UserError
from emoe.families import most_positions, spec_of
from emoe.plainfiles import read_json
from emoe.surgery.modules import Anatomy, Seen

Progress = Callable[[str, int, int], None]
Count = Literal["probability", "hard", "energy"]


def load_model(folder: Path, *, head: bool, flag: str = "--model") -> nn.Module:
    """The model in fp32 and evaluation; with its language head, or without any.

    Raises:
        UserError: it has no causal language head, but one is wanted; or no weights that can be read.
    """
    auto = transformers.AutoModelForCausalLM if head else transformers.AutoModel
    try:
        model, info = auto.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    except ValueError as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(f"{flag}: {folder} is no causal language model ({first_line})") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{flag}: {folder} has no usable weights ({' '.join(str(error).split())[:160]})") from None
    if head and is_encoder(model.config):
        raise UserError(f"{flag}: {folder} is an encoder, which predicts no next token; give a causal language model")
    if head and info["missing_keys"]:  # a tied head is not missing; any other would be drawn at random
        missing = min(info["missing_keys"])
        raise UserError(f"{flag}: {folder} has no {missing}; give a causal language model, with its head")
    return model.eval()


def is_encoder(facts: Any) -> bool:
    """Whether a model of this config sees what stands behind a token; transformers gives such a one a causal head."""
    spec = spec_of(facts)
    return spec is not None and spec.encoder and not getattr(facts, "is_decoder", False)


def fit_length(folder: Path, length: int) -> tuple[int, list[str]]:
    """``--sequence-length`` that the model has positions for, and what to tell the user about it.

    Raises:
        UserError: the folder holds no model that transformers knows.
    """
    try:
        facts = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"--model: {folder} is not the folder of a model ({str(error).splitlines()[0]})") from None
    longest = most_positions(facts)
    if longest is None or length <= longest:
        return length, []
    return longest, [f"--sequence-length lowered from {length} to the model's {longest}"]


def read_blocks(folder: Path, sources: list[str], *, length: int, tokens: int, seed: int, flag: str) -> torch.Tensor:
    """Token blocks (blocks, T) for a model, no longer than its positions.

    Raises:
        UserError: too little text.
    """
    length, _ = fit_length(folder, length)
    tokenizer = read_tokenizer(folder)
    found = load_blocks(
        sources, tokenizer, length=length, calibration_tokens=tokens, held_out_tokens=0, seed=seed, flag=flag
    )
    return found.calibration


@contextlib.contextmanager
def text_of(config: PruneConfig) -> Iterator[list[str]]:
    """Sources of text to count on; the texts that a task trains on lie in a file meanwhile."""
    if not config.task:
        yield config.text
        return
    from emoe import tasks
    from emoe.tasks.data import load_task

    data = load_task(tasks.get(config.task), domains=[])
    texts = ("\n".join(filter(None, (example.text, example.pair))) for example in data.train)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "task.txt"
        path.write_text("\n\n".join(texts), encoding="utf-8")
        yield [str(path)]


def check_budget(folder: Path, top_k: int | None) -> None:
    """Raise `UserError` unless a model can be made to use so many modules a token; None asks for nothing."""
    if top_k is None:
        return
    config = read_json(folder / "config.json")
    if not str(config.get("model_type")).startswith("emoe_"):
        raise UserError("--top-k: only converted models have a budget that can be set; leave it out")
    experts = read_converted(folder)["num_experts"]
    if top_k > experts:
        raise UserError(f"--top-k: {top_k} must lie between 1 and the model's {experts} experts")


def check_finite(what: str, *found: torch.Tensor | None) -> None:
    """Raise `UserError` for NaN or infinity, which nothing can be counted by."""
    if not all(part is None or torch.isfinite(part).all() for part in found):
        raise UserError(
            f"--model: {what} gets NaN or infinite numbers, so weights are damaged; look with `emoe inspect --verify` "
            "and copy or make the model again"
        )


class Use:
    """Sums over tokens of what a set's modules did."""

    def __init__(self, count: int) -> None:
        zeros = lambda: torch.zeros(count, dtype=torch.float64)  # noqa: E731
        self.hard_E, self.probability_E, self.energy_E = zeros(), zeros(), zeros()
        self.tokens = 0

    def add(self, seen: Seen) -> None:
        """Count N tokens. Probabilities are the weights of the choices."""
        chosen_NE = seen.mask()
        self.hard_E += chosen_NE.sum(0).double().cpu()
        self.probability_E += seen.weights().sum(0).double().cpu()
        if seen.energy_NE is not None:
            energy_NE = seen.energy_NE / seen.energy_NE.sum(1, keepdim=True).clamp_min(1e-30)
            self.energy_E += energy_NE.sum(0).double().cpu()
        self.tokens += len(chosen_NE)

    def of(self, kind: Count) -> torch.Tensor:
        """One of the sums, (E,) fp64. Energy is each token's share, whether chosen or not."""
        return {"probability": self.probability_E, "hard": self.hard_E, "energy": self.energy_E}[kind]


@torch.no_grad()
def count_use(
    anatomy: Anatomy, model: nn.Module, blocks_BT: torch.Tensor, *, kind: Count, batch: int, progress: Progress
) -> dict[str, torch.Tensor]:
    """Use of each module, (E,) fp64, by name of its set.

    Raises:
        UserError: gates see what is no number.
    """
    use = {found.name: Use(found.count) for found in anatomy.sets()}

    def see(name: str, seen: Seen) -> None:
        check_finite(name, seen.logits_NE, seen.energy_NE)
        use[name].add(seen)

    with anatomy.watch(model, see, energies=kind == "energy"):
        for done, part_BT in enumerate(blocks_BT.split(batch)):
            progress("counting", done * batch, len(blocks_BT))
            model(part_BT.to(next(model.parameters()).device), **no_cache(model))
    return {name: found.of(kind) for name, found in use.items()}


def no_cache(model: nn.Module) -> dict[str, Any]:
    """What tells a model's forward to keep nothing for the next token."""
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}
