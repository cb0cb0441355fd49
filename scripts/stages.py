"""What the experiments on surgery share: stages that are done once, measurements, and where figures come from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import emoe
from emoe.calibration.text import load_blocks, read_source
from emoe.config import ExtendConfig, PruneConfig, TuneConfig
from emoe.finetuning.loop import perplexities
from emoe.finetuning.plain_text import tune
from emoe.runtime import write_text
from emoe.surgery.extend import extend
from emoe.surgery.prune import prune

PIECE = 1 << 14
"""Characters of the pieces that are held out or not."""


class Stages:
    """Checkpoints and measurements by name in a folder; what is there is not made again, so that a run goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def checkpoint(self, name: str, build: Callable[[Path], Any]) -> Path:
        """The folder of this name, made by ``build(folder)`` if it is not there."""
        target = self.folder / name
        if not target.exists():
            start = time.perf_counter()
            build(target)
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        return target

    def figures(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute()`` gave, from NAME.json if that is there."""
        target = self.folder / f"{name}.json"
        if not target.is_file():
            write_text(target, json.dumps(compute()))
        return json.loads(target.read_text(encoding="utf-8"))

    def converted(self, model: str, name: str = "converted", **settings: Any) -> Path:
        """A dense model as its Emergent MoE; a folder with experts is taken as it is."""
        if (Path(model) / "config.json").is_file():
            kind = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["model_type"]
            if kind == "moduleformer" or kind.startswith("emoe_"):
                return Path(model)
        return self.checkpoint(name, lambda out: emoe.convert(model, output=out, held_out_tokens=0, **settings))

    def texts(self, sources: dict[str, str], megabytes: float = 4.0) -> dict[str, Path]:
        """Text by name, split once: ``train/NAME.txt``, of which the paths are given, and ``held/NAME.txt``.

        Every tenth piece of `PIECE` characters is held out, so that it comes from all over the text; ``megabytes`` is
        what is read of each source.
        """
        for part in ("train", "held"):
            (self.folder / part).mkdir(exist_ok=True)
        for name, source in sources.items():
            if (self.folder / "train" / f"{name}.txt").is_file():
                continue
            text, wanted = [], int(megabytes * 1e6)
            for piece in read_source(source, "--domains"):
                text.append(piece)
                wanted -= len(piece)
                if wanted <= 0:
                    break
            whole = "".join(text)
            pieces = [whole[i : i + PIECE] for i in range(0, len(whole), PIECE)]
            write_text(self.folder / "held" / f"{name}.txt", "\n".join(pieces[5::10]))
            write_text(self.folder / "train" / f"{name}.txt", "\n".join(p for i, p in enumerate(pieces) if i % 10 != 5))
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


def measured(folder: Path, held: list[str], tokens: int, length: int) -> dict[str, float]:
    """Perplexity of a checkpoint on held-out texts, by their names; drawn from all over them."""
    tokenizer, found = transformers.AutoTokenizer.from_pretrained(folder), {}
    for source in held:
        settings = {"length": length, "calibration_tokens": tokens, "held_out_tokens": 0, "seed": 0, "flag": source}
        found[Path(source).stem] = load_blocks([source], tokenizer, **settings).calibration
    return perplexities(load(folder), found)


def parameters(folder: Path) -> int:
    """Of the model as transformers loads it, tied ones once."""
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(folder)
        return sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())


def origin() -> dict[str, Any]:
    """Command, commit, hardware, versions."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }


def footer(result: dict[str, Any]) -> str:
    """The last line of a page of results."""
    return f"\n`{result['command']}`, commit {result['commit'][:12]}, {result['hardware']}, {result['torch']}.\n"


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
