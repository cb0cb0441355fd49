"""Convert a dense checkpoint into its Emergent Mixture-of-Experts, one layer in memory at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from emoe.calibration.text import check_source
from emoe.checkpoint.companions import licence_fields, licence_of
from emoe.checkpoint.digests import write_digests
from emoe.checkpoint.given import given_output
from emoe.checkpoint.partition import NAME as PARTITION
from emoe.checkpoint.partition import Partition
from emoe.checkpoint.reader import CheckpointReader
from emoe.checkpoint.writer import ShardWriter
from emoe.config import ConvertConfig, resolve_config
from emoe.conversion.artefact import SETTINGS, write_companions
from emoe.conversion.engine import Engine, Progress
from emoe.conversion.plan import Plan, make_plan
from emoe.conversion.quality import Quality
from emoe.conversion.resuming import Work
from emoe.conversion.workspace import Workspace
from emoe.distributed import Group
from emoe.runtime import require_space, write_text

REPORT = "emoe_report.json"
"""What a conversion measured, how long it took."""

END_SHARD_BYTES = 512 << 20
"""Embeddings and head are split into shards of about this size: writing one takes no more memory than a layer."""


def prepare(
    config: ConvertConfig,
    notes: list[str] | None = None,
    measured: list[int] | None = None,
    say: Callable[[str], None] | None = None,
) -> Plan:
    """Resolve the model and check everything that can be checked without reading weights.

    Args:
        notes: lines to show with the plan.
        measured: numbers of experts at which quality is measured, where not the usual ones.
        say: called with one line when something slow starts: a download, a .gguf file being read.
    """
    from emoe.assets import resolve_model

    for flag, sources in (("--calibration", config.calibration), ("--held-out", config.held_out)):
        for source in sources:
            check_source(source, flag)
    resolved = resolve_model(config.model, accept_license=config.accept_license, revision=config.revision, progress=say)
    # A folder's whole path says more of its owner than of the model.
    origin = f"folder {resolved.folder.name}" if resolved.kind == "folder" else resolved.source
    licence = licence_of(resolved.folder) or (licence_fields(resolved.licence) if resolved.licence else {})
    return make_plan(config, CheckpointReader(resolved.folder), config.model, origin, notes or [], measured, licence)


def convert(
    model: str | Path | None = None,
    *,
    output: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict:
    """Convert ``model`` into ``output``, by default the model's name and "-emoe", here. Returns the report.

    Args:
        model: an alias, a folder, a .gguf file or a hub id.
        output: the folder to write.
        progress: called with stage, done, total.
        settings: the fields of `ConvertConfig`.

    Raises:
        UserError: bad input; the message names the command's flag for the setting.
    """
    config, note = resolve_config({"model": model, "output": output, **settings})
    return run(prepare(config, [note]), progress or (lambda stage, done, total: None))


def workspace_of(plan: Plan, group: Group | None = None) -> Workspace:
    """Where a plan's output will grow; raises `UserError` when the plan names none."""
    c = plan.config
    output = given_output(c.output)
    rank = group.rank if group else 0
    work = Work("conversion", c, SETTINGS, REPORT)  # surgery hands the settings on
    return Workspace(output, plan.reader.folder, resume=c.resume, overwrite=c.overwrite, work=work, rank=rank)


def run(plan: Plan, progress: Progress) -> dict:
    """Carry out a plan. Returns the report that also lies in the output as emoe_report.json."""
    group = Group()
    workspace = workspace_of(plan, group)
    with workspace.open(group):
        try:
            group.first_then_all(
                lambda: require_space(workspace.output.parent, plan.disk_bytes() - workspace.held_bytes(), "--output")
            )
            report = _Conversion(plan, workspace, progress, group).run()
            group.first_then_all(workspace.publish)
            return report
        except Exception:
            workspace.abandon()
            raise


class _Conversion:
    """An engine whose layers are written, and whose state is kept for --resume."""

    def __init__(self, plan: Plan, workspace: Workspace, progress: Progress, group: Group) -> None:
        self.plan, self.workspace, self.config, self.reader = plan, workspace, plan.config, plan.reader
        self.progress, self.group = progress, group
        self.engine = Engine(plan, workspace.folder, progress, group)
        self.end_shards = self._plan_end_shards()
        self.writer = ShardWriter(workspace.folder, len(self.end_shards) + self.reader.num_layers)
        self._last_state = 0.0

    def _plan_end_shards(self) -> list[list[str]]:
        """Names of the tensors outside the layers, grouped into shards."""
        groups: list[list[str]] = [[]]
        size = 0
        for name in self.reader.layer_names(None):
            tensor_bytes = self.reader.nbytes(name)
            if groups[-1] and size + tensor_bytes > END_SHARD_BYTES:
                groups, size = [*groups, []], 0
            groups[-1].append(name)
            size += tensor_bytes
        return groups

    def run(self) -> dict:
        engine = self.engine
        engine.open()
        self._restore()
        with engine.watch("writing"):
            for number, names in enumerate(self.end_shards):
                if self.group.first:
                    self.writer.write(number, self.reader.read(names))
        quality = engine.run(self._write_layer, self._save_state)
        report = self._report(quality)
        with engine.watch("writing"):
            self.writer.flush()
            self.group.wait()
            self.group.first_then_all(lambda: self._finish(report))
        self.progress("done", *engine.progress())
        return report

    def _restore(self) -> None:
        state = self.workspace.load_state(self.engine.fingerprint()) if self.config.resume else None
        if state is not None:
            self.engine.restore(state, self.workspace.state_tensors(state))
            self._last_state = sum(self.engine.watch.seconds.values())

    def _save_state(self) -> None:
        watch = self.engine.watch
        elapsed = sum(watch.seconds.values())
        if not self.group.first_then_all(lambda: elapsed - self._last_state >= self.config.checkpoint_seconds):
            return
        with watch("saving state"):
            self.writer.flush()
            facts, tensors = self.engine.state()
            self.workspace.save_state(facts, tensors, self.group)
        self._last_state = sum(watch.seconds.values())

    def _write_layer(self, index: int, tensors: dict[str, torch.Tensor]) -> None:
        if self.group.first or self.engine.by_layer:
            self.writer.write(len(self.end_shards) + index, tensors, wait=False)

    def _report(self, quality: Quality | None) -> dict:
        engine = self.engine
        return {
            "model": self.plan.source,
            "origin": self.plan.origin,
            "model_type": self.reader.spec.model_type,
            "num_layers": self.reader.num_layers,
            "converted_layers": self.plan.layers,
            "num_neurons": self.plan.num_neurons,
            "num_experts": self.config.experts,
            "num_experts_per_tok": self.plan.top_k,
            "split": self.config.split,
            "gate": self.config.gate,
            "routing": self.plan.routing,
            "allocation": self.plan.allocation,
            "compensated": self.config.compensate,
            "outputs_refitted": self.config.refit_outputs,
            "calibration": self.config.calibration,
            "calibration_tokens": int(engine.blocks.calibration.numel()) if engine.blocks else 0,
            "seed": self.config.seed,
            "dtype": str(engine.stream.dtype).removeprefix("torch."),
            "processes": self.group.size,
            "gate_bytes": self.plan.gate_bytes(),
            "quality": quality.to_json() if quality else None,
            "layers": engine.layer_reports,
            "seconds": {stage: round(seconds, 3) for stage, seconds in engine.watch.seconds.items()},
            "peak_bytes": engine.watch.peak_bytes,
        }

    def _finish(self, report: dict) -> None:
        from emoe.report.card import write_card
        from emoe.report.plots import plot_quality

        folder = self.workspace.folder
        self.writer.finish()
        facts = {"split": self.config.split, "seed": str(self.config.seed), "source": self.plan.origin}
        partition = Partition(self.config.experts, self.engine.survey.labels, self.engine.digests, facts)
        partition.save(folder / PARTITION)
        write_digests(folder, self.writer.digests)
        source_digest = hashlib.sha256(json.dumps(partition.digests, sort_keys=True).encode()).hexdigest()
        write_companions(self.plan, folder, source_digest, self.engine.blocks)
        write_text(folder / REPORT, json.dumps(report, indent=2) + "\n")
        if report["quality"]:
            plot_quality(report, folder / "emoe_report.png")
        write_card(report, self.plan, folder / "README.md")
