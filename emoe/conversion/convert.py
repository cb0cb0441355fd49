"""Convert a dense checkpoint into its Emergent Mixture-of-Experts, one layer in memory at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import emoe
from emoe.calibration.stream import HiddenStates, StreamedModel
from emoe.calibration.text import TokenBlocks, load_blocks
from emoe.checkpoint.partition import NAME as PARTITION
from emoe.checkpoint.partition import Partition, digest_ffn, order_of
from emoe.checkpoint.reader import CheckpointReader
from emoe.checkpoint.writer import ShardWriter
from emoe.config import ConvertConfig, resolve_config
from emoe.conversion.artefact import emoe_config, write_companions
from emoe.conversion.layer import fit_gate, observe, reorder_layer, split_neurons
from emoe.conversion.plan import Plan, make_plan
from emoe.conversion.quality import Quality, mask_tokens, measure_streams, next_token_labels
from emoe.conversion.workspace import Workspace
from emoe.errors import UserError
from emoe.families.neurons import reorder
from emoe.modeling.modeling_emoe import SparseFFN, make_sparse
from emoe.runtime import Stopwatch, require_space, write_text

END_SHARD_BYTES = 512 << 20
"""Embeddings and head are split into shards of about this size: writing one takes no more memory than a layer."""

CALIBRATION, DENSE = "calibration", "dense"

Progress = Callable[[str, int, int], None]
"""Called as (what happens now, layers done, layers in all)."""


def prepare(config: ConvertConfig, notes: list[str] | None = None) -> Plan:
    """Resolve the model and check everything that can be checked without reading weights."""
    from emoe.assets import resolve_model

    if not config.model:
        raise UserError("--model: missing; give an alias (see `emoe models`), a folder, a .gguf file or a hub id")
    resolved = resolve_model(config.model, accept_license=config.accept_license, revision=config.revision)
    # A folder's whole path says more of its owner than of the model.
    origin = f"folder {resolved.folder.name}" if resolved.kind == "folder" else resolved.source
    return make_plan(config, CheckpointReader(resolved.folder), config.model, origin, notes or [])


def convert(
    model: str | None = None, *, output: str | Path | None = None, progress: Progress | None = None, **settings: Any
) -> dict:
    """Convert ``model`` into ``output``; ``settings`` are the fields of `ConvertConfig`. Returns the report.

    Raises:
        UserError: bad input; the message names the command's flag for the setting.
    """
    config, note = resolve_config({"model": model, "output": str(output) if output else None, **settings})
    return run(prepare(config, [note]), progress or (lambda stage, done, total: None))


def workspace_of(plan: Plan) -> Workspace:
    """Where a plan's output will grow; raises `UserError` when the plan names none."""
    c = plan.config
    if not c.output:
        raise UserError("--output: missing; name the folder to write")
    return Workspace(Path(c.output), plan.reader.folder, resume=c.resume, overwrite=c.overwrite)


def run(plan: Plan, progress: Progress) -> dict:
    """Carry out a plan. Returns the report that also lies in the output as emoe_report.json."""
    workspace = workspace_of(plan)
    with workspace.open():
        try:
            require_space(workspace.output.parent, plan.disk_bytes() - workspace.held_bytes(), "--output")
            report = _Conversion(plan, workspace, progress).run()
            workspace.publish()
            return report
        except OSError as error:
            workspace.abandon()
            raise UserError(
                f"--output: cannot write {workspace.output} ({error.strerror or error}); the source and any earlier "
                "output are untouched; make room and add --resume"
            ) from None
        except UserError:
            workspace.abandon()
            raise


class _Conversion:
    """The state of one run: streams of hidden states, and what is known of the layers done so far."""

    def __init__(self, plan: Plan, workspace: Workspace, progress: Progress) -> None:
        self.plan, self.workspace, self.config = plan, workspace, plan.config
        self.reader, self.progress = plan.reader, progress
        self.next_layer = 0
        self.watch = Stopwatch(lambda stage: progress(stage, self.next_layer, self.reader.num_layers))
        self.emoe_config = emoe_config(plan)
        self.partition = Partition(self.config.experts)
        self.streams: dict[str, HiddenStates] = {}
        self.layer_reports: list[dict[str, Any]] = []
        self.end_shards = self._plan_end_shards()
        self.writer = ShardWriter(workspace.folder, len(self.end_shards) + self.reader.num_layers)
        self.stream: StreamedModel | None = None
        self.blocks: TokenBlocks | None = None
        self.seen = self.labels = None
        self._last_state = 0.0

    # -- beginning --------------------------------------------------------------------------------------------------

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

    def _device(self) -> str:
        if self.config.device != "auto":
            return self.config.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    def _dtype(self) -> torch.dtype:
        if self.config.dtype != "auto":
            return getattr(torch, self.config.dtype)
        stored = self.reader.dtype
        # Half precision on a CPU has no fast kernels and little range.
        return torch.float32 if stored == torch.float16 and self._device() == "cpu" else stored

    def _read_text(self) -> None:
        from transformers import AutoTokenizer

        c = self.config
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.reader.folder, trust_remote_code=False)
        except Exception as error:
            problem = str(error).strip().splitlines()[0]
            raise UserError(
                f"--model: no usable tokenizer in {self.reader.folder} ({problem}); without one only "
                "--split weights --gate average-key --held-out-tokens 0 works"
            ) from None
        self.blocks = load_blocks(
            c.calibration,
            tokenizer,
            length=c.sequence_length,
            calibration_tokens=c.calibration_tokens,
            held_out_tokens=c.held_out_tokens,
            seed=c.seed,
        )
        largest = max(int(part.max()) for part in (self.blocks.calibration, self.blocks.held_out) if part.numel())
        if largest >= self.reader.config.vocab_size:
            raise UserError(f"--model: the tokenizer in {self.reader.folder} has more entries than the embedding")
        self.seen = self.blocks.held_out
        if self.stream.measure == "masked-LM loss":
            if tokenizer.mask_token_id is None:
                raise UserError("--model: its tokenizer has no mask token to measure with; add --held-out-tokens 0")
            self.seen, self.labels = mask_tokens(
                self.blocks.held_out, tokenizer.mask_token_id, tokenizer.all_special_ids, c.seed
            )
        else:
            self.labels = next_token_labels(self.blocks.held_out)

    def _embed(self) -> None:
        self.stream.load_ends()
        if self.plan.needs_activations:
            self.streams[CALIBRATION] = self.stream.embed(self.blocks.calibration)
        if self.config.held_out_tokens:
            self.streams[DENSE] = self.stream.embed(self.seen)
        self.stream.drop_ends()

    # -- resuming ---------------------------------------------------------------------------------------------------

    def _fingerprint(self) -> dict[str, Any]:
        files = sorted({path.resolve() for path in self.reader.shards.values()})
        stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        source = hashlib.sha256(json.dumps([self.reader.raw_config, stamps], sort_keys=True).encode()).hexdigest()
        return {
            **self.config.fingerprint(),
            "source": source,
            "text": self.blocks.digest if self.blocks else None,
            "dtype": str(self.stream.dtype),
            "device": str(self.stream.device),
            "emoe": emoe.__version__,
        }

    def _restore(self) -> None:
        state = self.workspace.load_state(self._fingerprint()) if self.config.resume else None
        if state is None:
            return
        self.next_layer, self.layer_reports = state["next_layer"], state["layers"]
        self.watch.seconds, self.watch.peak_bytes = state["seconds"], state["peak_bytes"]
        self.partition.digests = {int(i): digest for i, digest in state["digests"].items()}
        for name, tensor in self.workspace.state_tensors(state):
            kind, _, rest = name.partition("/")
            if kind == "labels":
                self.partition.labels[int(rest)] = tensor
            else:
                self.streams[rest] = self.stream.hidden_states(tuple(tensor.shape))
                self.streams[rest].data.copy_(tensor)
        self._last_state = sum(self.watch.seconds.values())

    def _save_state(self) -> None:
        elapsed = sum(self.watch.seconds.values())
        if elapsed - self._last_state < self.config.checkpoint_seconds:
            return
        with self.watch("saving state"):
            tensors = {f"labels/{i}": labels for i, labels in self.partition.labels.items()}
            tensors |= {f"stream/{name}": states.data for name, states in self.streams.items()}
            state = {
                "fingerprint": self._fingerprint(),
                "next_layer": self.next_layer,
                "layers": self.layer_reports,
                "digests": self.partition.digests,
                "seconds": self.watch.seconds,
                "peak_bytes": self.watch.peak_bytes,
            }
            self.workspace.save_state(state, tensors)
        self._last_state = sum(self.watch.seconds.values())

    # -- the work ---------------------------------------------------------------------------------------------------

    def run(self) -> dict:
        with self.watch("reading text"):
            self.stream = StreamedModel(
                self.reader,
                dtype=self._dtype(),
                device=self._device(),
                batch_tokens=self.config.batch_tokens,
                memory_limit=int(self.config.cache_limit * (1 << 30)),
                folder=self.workspace.folder,
            )
            if self.plan.needs_text:
                self._read_text()
        with self.watch("embedding"):
            if self.plan.needs_text:
                self._embed()
        self._restore()
        with self.watch("writing"):
            for number, names in enumerate(self.end_shards):
                self.writer.write(number, self.reader.read(names))
        while self.next_layer < self.reader.num_layers:
            self._layer(self.next_layer)
            self.next_layer += 1
            self._save_state()
        quality = self._quality()
        report = self._report(quality)
        with self.watch("writing"):
            self._finish(report)
        self.progress("done", self.next_layer, self.reader.num_layers)
        return report

    def _layer(self, index: int) -> None:
        chosen = index in self.plan.layers
        if index > self.plan.layers[-1]:
            self.streams.pop(CALIBRATION, None)
        with self.watch("reading"):
            tensors = self.reader.read(self.reader.layer_names(index))
            layer = self.stream.build_layer(index, tensors) if chosen or self.streams else None
        statistics = inputs = None
        if CALIBRATION in self.streams:
            with self.watch("calibration"):
                if chosen:
                    statistics, inputs = observe(self.stream, layer, index, self.streams[CALIBRATION], self.plan)
                else:
                    self.stream.run_all(layer, index, self.streams[CALIBRATION])
        if DENSE in self.streams:
            with self.watch("measuring"):
                if chosen:
                    for k in self.plan.measured_k:
                        self.streams.setdefault(f"k={k}", self.streams[DENSE].copy(self.stream))
                self.stream.run_all(layer, index, self.streams[DENSE])
        extra: dict[str, torch.Tensor] = {}
        ffn = None
        if chosen:
            ffn, extra = self._convert_layer(layer, index, tensors, statistics, inputs)
        with self.watch("measuring"):
            self._measure_layer(layer, index, ffn)
        with self.watch("writing"):
            self.writer.write(len(self.end_shards) + index, self._layer_tensors(index, tensors) | extra)

    def _convert_layer(self, layer, index, tensors, statistics, inputs) -> tuple[SparseFFN, dict[str, torch.Tensor]]:
        self.layer_reports.append({"layer": index, "neurons": statistics.report() if statistics else None})
        with self.watch("clustering"):
            labels_F = split_neurons(layer, index, statistics, self.plan)
        self.partition.labels[index] = labels_F
        self.partition.digests[index] = digest_ffn(self.reader.ffn_tensors(index), tensors)
        reorder_layer(layer, index, labels_F, self.plan)
        ffn = make_sparse(layer, self.emoe_config)
        if self.plan.gate.needs_calibration:
            with self.watch("gate"):
                for _ in fit_gate(self.stream, ffn, inputs, self.plan):
                    pass
        path = self.reader.layer_prefix(index) + (f"{self.reader.spec.ffn}." if self.reader.spec.ffn else "")
        return ffn, {f"{path}router.{name}": b.cpu() for name, b in ffn.router.named_buffers()}

    def _measure_layer(self, layer, index: int, ffn: SparseFFN | None) -> None:
        """Advance the converted streams; at the chosen K, note how evenly the experts are used."""
        load_E = torch.zeros(self.config.experts, dtype=torch.int64)

        def count(_, __, routing) -> None:
            load_E.add_(torch.bincount(routing.experts_NK.flatten().cpu(), minlength=self.config.experts))

        for k in self.plan.measured_k:
            if f"k={k}" not in self.streams:
                continue
            if ffn is not None:
                ffn.router.top_k = k
            hook = ffn.router.register_forward_hook(count) if ffn is not None and k == self.plan.top_k else None
            self.stream.run_all(layer, index, self.streams[f"k={k}"])
            if hook:
                hook.remove()
        if ffn is not None:
            self.layer_reports[-1]["load"] = _load_summary(load_E)

    def _layer_tensors(self, index: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The layer as it is written: the source's tensors in their own type, neurons reordered."""
        if index not in self.partition.labels:
            return tensors
        order_F = order_of(self.partition.labels[index])
        moved = {
            name: reorder(self.reader.spec, role, kind, tensors[name], order_F)
            for name, (role, kind) in self.reader.ffn_tensors(index).items()
        }
        return tensors | moved

    # -- the end ----------------------------------------------------------------------------------------------------

    def _ffn_flops(self, k: int) -> float:
        """Multiplications of converted FFNs with their gates, relative to dense."""
        width, c = self.reader.config.hidden_size, self.config
        dense = (3 if self.reader.spec.gated else 2) * width * self.plan.num_neurons
        rows = 2 if c.gate == "representative" and self.reader.spec.gated else 1
        return 1.0 if k == c.experts else k / c.experts + rows * width * c.experts / dense

    def _quality(self) -> Quality | None:
        if DENSE not in self.streams:
            return None
        with self.watch("measuring"):
            if self.stream.measure != "hidden-state error":
                self.stream.load_ends()
            converted = {k: self.streams[f"k={k}"] for k in self.plan.measured_k}
            flops = {k: self._ffn_flops(k) for k in self.plan.measured_k}
            quality = measure_streams(
                self.stream, self.seen, self.labels, self.streams[DENSE], converted, flops, self.config.experts
            )
            self.stream.drop_ends()
        return quality

    def _report(self, quality: Quality | None) -> dict:
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
            "calibration": self.config.calibration,
            "calibration_tokens": int(self.blocks.calibration.numel()) if self.blocks else 0,
            "seed": self.config.seed,
            "dtype": str(self.stream.dtype).removeprefix("torch."),
            "gate_bytes": self.plan.gate_bytes(),
            "quality": quality.to_json() if quality else None,
            "layers": self.layer_reports,
            "seconds": {stage: round(seconds, 3) for stage, seconds in self.watch.seconds.items()},
            "peak_bytes": self.watch.peak_bytes,
        }

    def _finish(self, report: dict) -> None:
        from emoe.report.card import write_card
        from emoe.report.plots import plot_quality

        folder = self.workspace.folder
        self.writer.finish()
        self.partition.facts = {"split": self.config.split, "seed": str(self.config.seed), "source": self.plan.origin}
        self.partition.save(folder / PARTITION)
        source_digest = hashlib.sha256(json.dumps(self.partition.digests, sort_keys=True).encode()).hexdigest()
        write_companions(self.plan, folder, source_digest, self.blocks)
        write_text(folder / "emoe_report.json", json.dumps(report, indent=2) + "\n")
        if report["quality"]:
            plot_quality(report, folder / "emoe_report.png")
        write_card(report, self.plan, folder / "README.md")


def _load_summary(load_E: torch.Tensor) -> dict[str, float] | None:
    """How evenly experts are used: busiest and idlest share times E (1 is even), and entropy over its maximum."""
    total = int(load_E.sum())
    if total == 0:
        return None
    p_E = load_E.double() / total
    entropy = -(p_E * p_E.clamp_min(1e-12).log()).sum().item()
    experts = len(load_E)
    evenness = entropy / torch.tensor(float(experts)).log().item() if experts > 1 else 1.0
    return {
        "busiest": round(p_E.max().item() * experts, 4),
        "idlest": round(p_E.min().item() * experts, 4),
        "evenness": round(evenness, 4),
    }
