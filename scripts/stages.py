"""What the experiments on surgery share: stages that are done once, measurements, and where figures come from."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

import emoe
from emoe.assets import resolve_model
from emoe.calibration.text import CORPUS, held_out_blocks
from emoe.config import ExtendConfig, PretrainConfig, PruneConfig, TuneConfig
from emoe.conversion.workspace import PRETRAINED
from emoe.finetuning.loop import perplexities
from emoe.finetuning.plain_text import tune
from emoe.pretraining.text import Domain, pieces
from emoe.runtime import processor, write_text
from emoe.surgery.extend import extend
from emoe.surgery.history import digest_of
from emoe.surgery.prune import prune

ROOT = Path(__file__).parent

HELD_OUT = PretrainConfig().held_out_share
"""Share of each text that is held out: as in pre-training, so that both hold out the same."""

STRETCH = 1 << 10
"""Characters of the stretches that held-out text is mixed of."""


def settings_of(arguments: Namespace, models: Iterable[str | Path], *keyed: str) -> dict[str, Any]:
    """All that stages depend on: the arguments but those that name files or are ``keyed``, that is part of the stages'
    own names; and the digest of each model."""
    given = {k: v for k, v in vars(arguments).items() if k not in ("work", "output", *keyed)}
    given["digests"] = [digest_of(resolve_model(str(model)).folder) for model in models]
    return json.loads(json.dumps(given, default=str))


def _commit() -> str:
    """Of the code that runs, with a plus where it has been changed since."""
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True, cwd=ROOT).stdout  # noqa: E731
    return git("rev-parse", "HEAD").strip()[:12] + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


COMMIT = _commit()
"""Taken when the program starts: the folder may move on under a program that runs for hours."""


class Stages:
    """Checkpoints and measurements by name in a folder; what is there is not made again, so that a run goes on.

    Args:
        settings: what `settings_of` gives; a folder with stages of others is refused.

    Attributes:
        commits: those that made the stages which were asked for.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.commits = folder, {COMMIT}
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / "settings.json"
        if not kept.is_file() and any(folder.iterdir()):
            sys.exit(f"--work: {folder} holds something else; give another folder")
        before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else settings
        for key in {**before, **settings}:
            if before.get(key) != settings.get(key):
                sys.exit(
                    f"--work: {folder} holds stages of other settings ({key}: {before.get(key)}, now "
                    f"{settings.get(key)}); give another folder, or remove it"
                )
        write_text(kept, json.dumps(settings, indent=1) + "\n")

    def checkpoint(self, name: str, build: Callable[[Path], Any]) -> Path:
        """The folder of this name, made by ``build(folder)`` if it is not there."""
        target = self.folder / name
        if not target.exists():
            start = time.perf_counter()
            build(target)
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
            self._sign(name)
        self._read(name)
        return target

    def figures(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute()`` gave, from NAME.json if that is there."""
        target = self.folder / f"{name}.json"
        if not target.is_file():
            write_text(target, json.dumps(compute()))
            self._sign(name)
        self._read(name)
        return json.loads(target.read_text(encoding="utf-8"))

    def _sign(self, name: str) -> None:
        (self.folder / "commits").mkdir(exist_ok=True)
        write_text(self.folder / "commits" / name, COMMIT)

    def _read(self, name: str) -> None:
        signed = self.folder / "commits" / name
        self.commits.add(signed.read_text(encoding="utf-8") if signed.is_file() else "an unknown commit")

    def origin(self) -> dict[str, Any]:
        """Command, commits, hardware, versions."""
        return {
            "command": " ".join(["python", *sys.argv]),
            "commits": sorted(self.commits),
            "hardware": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
        }

    def converted(self, model: str, name: str = "converted", **settings: Any) -> Path:
        """A dense model as its Emergent MoE; a folder with experts is taken as it is."""
        if (Path(model) / "config.json").is_file():
            kind = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["model_type"]
            if kind == "moduleformer" or kind.startswith("emoe_"):
                return Path(model)
        return self.checkpoint(
            name, lambda out: emoe.convert(model, output=out, held_out_tokens=0, resume=True, **settings)
        )

    def texts(self, sources: dict[str, str], megabytes: float = 4.0) -> dict[str, Path]:
        """Text by name, split once: ``train/NAME.txt``, of which the paths are given, and ``held/NAME.txt``.

        Held out are the pieces that `emoe pretrain` holds out, too. They are mixed in stretches of `STRETCH`
        characters, so that any passage of them comes from all over what is read: so many megabytes of each source.
        """
        for part in ("train", "held"):
            (self.folder / part).mkdir(exist_ok=True)
        for name, source in sources.items():
            if (self.folder / "train" / f"{name}.txt").is_file():
                continue
            train, held, wanted = [], [], int(megabytes * 1e6)
            for apart, piece in pieces(Domain(name, source), HELD_OUT):
                (held if apart else train).append(piece)
                wanted -= len(piece)
                if wanted <= 0:
                    break
            stretches = [piece[i : i + STRETCH] for piece in held for i in range(0, len(piece), STRETCH)]
            random.Random(0).shuffle(stretches)
            write_text(self.folder / "held" / f"{name}.txt", "\n".join(stretches))
            write_text(self.folder / "train" / f"{name}.txt", "\n".join(train))
        return {name: self.folder / "train" / f"{name}.txt" for name in sources}

    def held(self, names: list[str]) -> list[str]:
        """Values of ``--held-out`` for these texts."""
        return [str(self.folder / "held" / f"{name}.txt") for name in names]

    def tuned(self, name: str, model: Path, **settings: Any) -> Path:
        """`emoe tune`; a stopped one goes on."""
        config = TuneConfig(model=str(model), output=str(self.folder / name), resume=True, **settings)
        return self.checkpoint(name, lambda out: tune(config, _silent))

    def pruned(self, name: str, model: Path, **settings: Any) -> Path:
        """`emoe prune`."""
        return self.checkpoint(
            name, lambda out: prune(PruneConfig(model=str(model), output=str(out), **settings), _silent)
        )

    def extended(self, name: str, model: Path, **settings: Any) -> Path:
        """`emoe extend`."""
        return self.checkpoint(
            name, lambda out: extend(ExtendConfig(model=str(model), output=str(out), **settings), _silent)
        )


def _silent(stage: str, done: int, total: int) -> None:
    pass


def load(folder: Path) -> torch.nn.Module:
    """The model for measuring, fp32."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check_pretraining(model: str | Path, new: dict[str, str] | None = None) -> None:
    """Leave with a message when a model of `emoe pretrain` has read what is held out here, or a text that is to be new.

    Args:
        new: sources by name.
    """
    report = Path(model) / PRETRAINED
    if not report.is_file():
        return
    settings = json.loads(report.read_text(encoding="utf-8"))["settings"]
    if settings["held_out_share"] != HELD_OUT:
        sys.exit(f"--model: {model} was pre-trained with --held-out-share {settings['held_out_share']}, not {HELD_OUT}")
    read = {item.partition("=")[2] or CORPUS + item for item in settings["corpus"]}
    for name, source in (new or {}).items():
        if source in read:
            sys.exit(f"--tasks: {name} is not new, {model} was pre-trained on {source}; pre-train one without it")


def blocks_of(folder: Path, source: str, tokens: int, length: int) -> torch.Tensor:
    """The tokens (blocks, length) of a held-out text that `emoe tune` measures on, too."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return torch.tensor(held_out_blocks(source, tokenizer, length, tokens))


def measured(folder: Path, held: list[str], tokens: int, length: int) -> dict[str, float]:
    """Perplexity of a checkpoint on held-out texts, by their names."""
    return perplexities(load(folder), {Path(text).stem: blocks_of(folder, text, tokens, length) for text in held})


def parameters(folder: Path) -> int:
    """Of the model as transformers loads it, tied ones once."""
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder)
        return sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())


def footer(result: dict[str, Any]) -> str:
    """The last line of a page of results."""
    made = ", ".join(result["commits"])
    return f"\n`{result['command']}`, stages made at {made}, {result['hardware']}, {result['torch']}.\n"


def figure(width: float, height: float):
    """An empty figure that draws to PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(made)
    return made


def save(made, path: Path) -> None:
    """PNG whose bytes depend on the data alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, format="png", metadata={"Software": None})
