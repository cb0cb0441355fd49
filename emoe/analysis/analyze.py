"""`emoe analyze`: which modules a model uses on which domain, and what happens without them.

Text streams through the model block by block; sums are kept beside the output, so that an interrupted analysis goes on
where it was. Legend: B blocks, T tokens of a block, C domains, E modules of a set.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from emoe.analysis.collect import DomainUse
from emoe.analysis.findings import describe_domains, findings
from emoe.calibration.text import read_tokenizer
from emoe.checkpoint.digests import check_digests
from emoe.checkpoint.given import WITH_EXPERTS, given_model, given_output
from emoe.checkpoint.writer import save_tensors
from emoe.config import AnalyzeConfig
from emoe.conversion.resuming import Work, refuse_finished, require_same_settings, require_same_sources
from emoe.disk import full_disk_told
from emoe.errors import UserError
from emoe.runtime import atomic_directory, fsync_directory, write_text
from emoe.surgery.history import digest_of
from emoe.surgery.modules import Anatomy, anatomy_of
from emoe.surgery.usage import Progress, check_budget, check_finite, fit_length, is_encoder, load_model, read_blocks

Write = Callable[[dict[str, Any], Path], None]
"""(report, folder) → files for people."""

REPORT = "usage.json"


def analyze(config: AnalyzeConfig, progress: Progress, write: Write) -> dict[str, Any]:
    """Measure, and write ``config.output``. Returns the report that also lies there as usage.json.

    Raises:
        UserError: domains that are not named or too short, a model without experts or with damaged weights, an output
            in the way or on a full disk.
    """
    folder, domains = given_model(config.model, WITH_EXPERTS), domain_sources(config.domains)
    anatomy = anatomy_of(folder)
    check_budget(folder, config.top_k)
    check_digests(folder)
    if not config.output:
        raise UserError("--output: missing; name the folder to write")
    state = _State(config)
    with full_disk_told(state.output, "add --resume", kept="any earlier output is untouched"):
        try:
            state.open()
            run = _Analysis(config, anatomy, domains, state, progress)
            for name in domains:
                run.domain(name)
            report = run.report()
            report["knock_out"] = run.knock_out(report["specialised"])
            state.publish(report, write)
        except BaseException:
            state.abandon()
            raise
    progress("done", 1, 1)
    return report


def domain_sources(given: list[str]) -> dict[str, str]:
    """``["fiction=a.txt"]`` → ``{"fiction": "a.txt"}``.

    Raises:
        UserError: none, one without a name, or a name twice.
    """
    if not given:
        raise UserError("--domains: missing; name at least one text, such as fiction=a.txt")
    found: dict[str, str] = {}
    for item in given:
        name, equals, source = item.partition("=")
        if not (name and equals and source):
            raise UserError(f"--domains: '{item}' is not NAME=TEXT, such as fiction=a.txt")
        if name in found:
            raise UserError(f"--domains: the name '{name}' is given twice")
        found[name] = source
    return found


class _State:
    """A hidden folder beside the output that --resume starts from; it goes when the output is complete."""

    def __init__(self, config: AnalyzeConfig) -> None:
        self.config, self.output = config, given_output(config.output).absolute()
        self.folder = self.output.with_name(f".{self.output.name}.emoe-analysis")
        if self.output.exists() and not self.output.is_dir():
            raise UserError(f"--output: {self.output} is a file; choose another name")
        if self.output.exists() and any(self.output.iterdir()):
            if not config.overwrite and not config.resume:
                raise UserError(f"--output: {self.output} exists; choose another folder or add --overwrite")
            if not (self.output / REPORT).is_file():
                raise UserError(f"--output: {self.output} is no analysis, it will not be replaced; choose another")
            if not config.overwrite and not self.folder.exists():
                refuse_finished(self.output, Work("analysis", config, REPORT))
        if any(self.folder.glob("*.safetensors")) and not (config.resume or config.overwrite):
            raise UserError(
                f"--output: an unfinished analysis lies in {self.folder}; add --resume to go on with it or --overwrite "
                "to start again"
            )

    def open(self) -> None:
        """Begin, or go on where the sums of the same settings end; `UserError` where they had others."""
        kept = self.folder / "settings.json"
        if self.config.resume and kept.is_file():
            require_same_settings(self.config.fingerprint(), kept, "analysis")
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_text(kept, json.dumps(self.config.fingerprint()))

    def require_sources(self, model: Path, blocks: dict[str, torch.Tensor]) -> None:
        """Raise `UserError` where the sums so far are of another model or of other text."""
        digests = {"--model": digest_of(model)}
        for name, blocks_BT in blocks.items():
            digests[f"--domains {name}"] = hashlib.sha256(blocks_BT.numpy().tobytes()).hexdigest()
        require_same_sources(digests, self.folder / "digests.json", "analysis")

    def load(self, number: int) -> dict[str, torch.Tensor] | None:
        """Sums of domain ``number``, if there are any yet."""
        path = self.folder / f"{number}.safetensors"
        return load_file(path) if path.is_file() else None

    def save(self, number: int, use: DomainUse) -> None:
        """Replace the sums of domain ``number``."""
        save_tensors(self.folder / f"{number}.safetensors", use.tensors())

    def abandon(self) -> None:
        """After a failure: keep what --resume can use, drop a folder without any sums."""
        if not any(self.folder.glob("*.safetensors")):
            shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, report: dict[str, Any], write: Write) -> None:
        """The output, complete or not at all; an earlier one goes only when this one is written."""
        page = self.folder / "page"
        shutil.rmtree(page, ignore_errors=True)
        with atomic_directory(page) as folder:
            write_text(folder / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")
            write(report, folder)
        if self.output.exists():
            os.rename(self.output, self.folder / "replaced")
        os.rename(page, self.output)
        fsync_directory(self.output.parent)
        shutil.rmtree(self.folder)


class _Analysis:
    """The model at work on the domains."""

    def __init__(
        self, config: AnalyzeConfig, anatomy: Anatomy, domains: dict[str, str], state: _State, progress: Progress
    ) -> None:
        self.config, self.anatomy, self.state, self.progress = config, anatomy, state, progress
        self.sets = anatomy.sets()
        self.blocks = {
            name: read_blocks(
                anatomy.folder,
                [source],
                length=config.sequence_length,
                tokens=config.tokens,
                seed=config.seed,
                flag="--domains",
            )
            for name, source in domains.items()
        }
        state.require_sources(anatomy.folder, self.blocks)
        self.tokenizer = read_tokenizer(anatomy.folder)
        facts = transformers.AutoConfig.from_pretrained(anatomy.folder, trust_remote_code=False)
        self.predicts = not is_encoder(facts)
        self.model = load_model(anatomy.folder, head=self.predicts)
        if config.top_k is not None:
            self.model.set_top_k(config.top_k)
        self.use: dict[str, DomainUse] = {}
        self.total = sum(map(len, self.blocks.values()))

    @torch.no_grad()
    def domain(self, name: str) -> None:
        """Let the domain's blocks through, from where an interrupted analysis was."""
        number, config = list(self.blocks).index(name), self.config
        use = self.use[name] = DomainUse(self.sets, config.examples)
        kept = self.state.load(number)
        if kept:
            use.restore(kept)
        before, last = sum(len(self.blocks[n]) for n in list(self.blocks)[:number]), time.monotonic()
        with self.anatomy.watch(self.model, use.add, energies=config.energies):
            while use.blocks < len(self.blocks[name]):
                part_BT = self.blocks[name][use.blocks :][: config.batch_sequences]
                self.progress(name, before + use.blocks, self.total)
                if self.predicts:
                    use.nats += self._nats(part_BT)
                    check_finite(f"the loss on {name}", torch.tensor(use.nats))
                    use.scored += part_BT[:, 1:].numel()
                else:
                    self.model(part_BT)
                use.blocks += len(part_BT)
                if time.monotonic() - last >= config.checkpoint_seconds:
                    self.state.save(number, use)
                    last = time.monotonic()
        self.state.save(number, use)

    def _nats(self, part_BT: torch.Tensor) -> float:
        """Sum of next-token losses."""
        logits_BTV = self.model(part_BT, use_cache=False).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), part_BT[:, 1:].flatten(), reduction="sum"
        ).item()

    def report(self) -> dict[str, Any]:
        """Everything but the knock-out."""
        return {
            "model": self.config.model,
            "settings": self.config.fingerprint(),
            "domains": describe_domains(self.use),
            "notes": self._notes(),
            **findings(self.sets, self.use, self._example),
        }

    def _notes(self) -> list[str]:
        notes = fit_length(self.anatomy.folder, self.config.sequence_length)[1]
        return notes if self.predicts else [*notes, "an encoder predicts no next token: no losses and no knock-outs"]

    def _example(self, domain: str, place: int) -> dict[str, str]:
        """A token with what stands before and behind it."""
        blocks_BT = self.blocks[domain]
        block, at = divmod(place, blocks_BT.shape[1])
        say = lambda ids: self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)  # noqa: E731
        row_T = blocks_BT[block]
        return {
            "domain": domain,
            "before": say(row_T[max(0, at - 12) : at]),
            "token": say(row_T[at : at + 1]),
            "behind": say(row_T[at + 1 : at + 7]),
        }

    @torch.no_grad()
    def knock_out(self, ranked: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What each domain loses without each of the most specialised modules, in nats a token; none of an encoder."""
        if not self.predicts:
            return []
        config, found = self.config, []
        few = {name: b[: max(1, config.knock_out_tokens // b.shape[1])] for name, b in self.blocks.items()}
        kept = self.state.folder / "knock_out.json"
        known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        tried = [None, *ranked[: config.knock_out]] if config.knock_out else []
        for done, row in enumerate(tried):
            self.progress("knock-out", done, len(tried))
            key = "none" if row is None else f"{row['set']}/{row['expert']}"
            if key not in known:
                out = nullcontext() if row is None else self.anatomy.without(self.model, row["set"], row["expert"])
                with out:
                    known[key] = {name: self._mean_loss(blocks_BT) for name, blocks_BT in few.items()}
                write_text(kept, json.dumps(known, allow_nan=False))
            if row is not None:
                change = {name: loss - known["none"][name] for name, loss in known[key].items()}
                found.append({"set": row["set"], "expert": row["expert"], "domain": row["domain"], "change": change})
        return found

    def _mean_loss(self, blocks_BT: torch.Tensor) -> float:
        nats = math.fsum(self._nats(part_BT) for part_BT in blocks_BT.split(self.config.batch_sequences))
        return nats / blocks_BT[:, 1:].numel()
