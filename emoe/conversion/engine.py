"""What every run over a model's layers has in common: text, hidden states, one layer in memory at a time.

A run has two passes. The *survey* sends text through the dense model and decides which neurons form experts and how
many of them each layer may use. The second pass fits each layer's router on what reaches it through the layers
converted so far, and measures quality on the way. `emoe convert` writes the layers of the second pass, `emoe frontier`
only measures.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import emoe
from emoe.calibration.stream import HiddenStates, StreamedModel
from emoe.calibration.text import TokenBlocks, load_blocks, read_tokenizer
from emoe.checkpoint.partition import digest_ffn
from emoe.conversion.artefact import emoe_config
from emoe.conversion.layer import ORACLE, RouterFit, let_go_of_file, let_oracle_choose, put_in_order, reordered
from emoe.conversion.plan import Plan
from emoe.conversion.quality import Load, Quality, mask_tokens, measure_streams, next_token_labels
from emoe.conversion.refit import refit_output
from emoe.conversion.survey import Survey, split_neurons, survey_layer
from emoe.distributed import Group
from emoe.errors import UserError
from emoe.modeling.ffn_emoe import SparseFFN, make_sparse
from emoe.runtime import Stopwatch, multiplies_bfloat16_fast

CALIBRATION, DENSE = "calibration", "dense"
SURVEY, CONVERT = "survey", "convert"

Progress = Callable[[str, int, int], None]
"""Called as (what happens now, layers done, layers in all); a layer counts once in each pass that it takes part in."""

Sink = Callable[[int, dict[str, torch.Tensor]], None]
"""Takes the tensors of a finished layer."""


class Engine:
    """The state of one run.

    Args:
        plan: what to do.
        folder: where hidden states past --cache-limit lie.
        group: the processes that share the text.
    """

    def __init__(self, plan: Plan, folder: Path, progress: Progress, group: Group | None = None) -> None:
        self.plan, self.config, self.reader = plan, plan.config, plan.reader
        self.folder, self.group = folder, group or Group()
        self.phase, self.next_layer = SURVEY if plan.needs_survey else CONVERT, 0
        self.watch = Stopwatch(lambda stage: progress(stage, *self.progress()))
        self.emoe_config = emoe_config(plan)
        self.survey = Survey()
        self.digests: dict[int, str] = {}
        # Without text there is nothing to add up: each process converts layers of its own.
        self.by_layer = not plan.needs_text and self.group.size > 1
        self.streams: dict[str, HiddenStates] = {}
        self.layer_reports: list[dict[str, Any]] = []
        self.loads = {k: Load(self.config.experts) for k in plan.measured_k}
        self.stream: StreamedModel | None = None
        self.blocks: TokenBlocks | None = None
        self.seen = self.labels = self.domains = None
        self._shares: dict[int, torch.Tensor] | None = None

    def progress(self) -> tuple[int, int]:
        """Layers done and layers in all, over both passes."""
        survey = self.plan.layers[-1] + 1 if self.plan.needs_survey else 0
        done = self.next_layer if self.phase == SURVEY else survey + self.next_layer
        return done, survey + self.reader.num_layers

    # -- beginning --------------------------------------------------------------------------------------------------

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

    def _statistics_dtype(self) -> torch.dtype | None:
        if self.config.calibrate_in != "auto":
            return getattr(torch, self.config.calibrate_in)
        fast = self._device() != "cpu" or multiplies_bfloat16_fast()
        return torch.bfloat16 if fast and self._dtype() == torch.float32 else None

    def open(self) -> None:
        """Read the text and make ready to stream."""
        with self.watch("reading text"):
            self.stream = StreamedModel(
                self.reader,
                dtype=self._dtype(),
                device=self._device(),
                batch_tokens=self.config.batch_tokens,
                memory_limit=int(self.config.cache_limit * (1 << 30)),
                folder=self.folder,
                statistics_dtype=self._statistics_dtype(),
                rank=self.group.rank,
                size=self.group.size,
            )
            if self.plan.needs_text:
                self.blocks = self.group.first_then_all(self._read_text)
                self._share_text()

    def _tokenizer(self) -> Any:
        return read_tokenizer(
            self.reader.folder, "without one only --split weights --gate average-key --held-out-tokens 0 works"
        )

    def _read_text(self) -> TokenBlocks:
        c = self.config
        blocks = load_blocks(
            c.calibration,
            self._tokenizer(),
            length=c.sequence_length,
            calibration_tokens=c.calibration_tokens,
            held_out_tokens=c.held_out_tokens,
            held_out=c.held_out,
            seed=c.seed,
        )
        largest = max(int(part.max()) for part in (blocks.calibration, *blocks.held_out.values()) if part.numel())
        if largest >= self.reader.config.vocab_size:
            raise UserError(f"--model: the tokenizer in {self.reader.folder} has more entries than the embedding")
        return blocks

    def _share_text(self) -> None:
        """This process's part of the text, and what is to be predicted of the held-out part."""
        held_out = torch.cat(list(self.blocks.held_out.values()))
        domains = torch.cat([torch.full((len(b),), i) for i, b in enumerate(self.blocks.held_out.values())])
        if self.stream.measure == "masked-LM loss" and len(held_out):
            tokenizer = self._tokenizer()
            if tokenizer.mask_token_id is None:
                raise UserError("--model: its tokenizer has no mask token to measure with; add --held-out-tokens 0")
            seen, labels = mask_tokens(held_out, tokenizer.mask_token_id, tokenizer.all_special_ids, self.config.seed)
        else:
            seen, labels = held_out, next_token_labels(held_out)
        mine = self.stream.share(seen)
        self.seen, self.labels, self.domains = seen[mine], labels[mine], domains[mine]

    def _embed(self) -> None:
        """The streams with which a pass begins."""
        with self.watch("embedding"):
            self.streams.clear()
            wanted = self.plan.needs_survey if self.phase == SURVEY else self.plan.needs_fit
            measured = self.phase == CONVERT and self.config.held_out_tokens > 0
            if wanted or measured:
                self.stream.load_ends()
            if wanted:
                text = self.blocks.calibration
                self.streams[CALIBRATION] = self.stream.embed(text[self.stream.share(text)])
            if measured:
                self.streams[DENSE] = self.stream.embed(self.seen)
            if wanted or measured:
                self.stream.drop_ends()

    # -- state ------------------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """What the result depends on."""
        files = sorted({path.resolve() for path in self.reader.shards.values()})
        stamps = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        source = hashlib.sha256(json.dumps([self.reader.raw_config, stamps], sort_keys=True).encode()).hexdigest()
        return {
            **self.config.fingerprint(),
            "source": source,
            "text": self.blocks.digest if self.blocks else None,
            "dtype": str(self.stream.dtype),
            "device": str(self.stream.device),
            "statistics": str(self.stream.statistics_dtype),
            "processes": self.group.size,
            "emoe": emoe.__version__,
        }

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """All that is needed to go on from here, as plain types and tensors."""
        facts = {
            "fingerprint": self.fingerprint(),
            "phase": self.phase,
            "next_layer": self.next_layer,
            "layers": self.layer_reports,
            "reports": self.survey.reports,
            "digests": self.digests,
            "loads": {k: load.to_json() for k, load in self.loads.items()},
            "seconds": self.watch.seconds,
            "peak_bytes": self.watch.peak_bytes,
        }
        return facts, self.survey.tensors() | {f"stream/{name}": s.data for name, s in self.streams.items()}

    def restore(self, facts: dict[str, Any], tensors: Any) -> None:
        """Go on from a `state`; `tensors` yields (name, tensor)."""
        self._embed()  # notes how the layers are called
        self.phase, self.next_layer, self.layer_reports = facts["phase"], facts["next_layer"], facts["layers"]
        self.watch.seconds, self.watch.peak_bytes = facts["seconds"], facts["peak_bytes"]
        self.survey.reports = {int(i): report for i, report in facts["reports"].items()}
        self.digests = {int(i): digest for i, digest in facts["digests"].items()}
        self.loads = {int(k): Load.from_json(load) for k, load in facts["loads"].items()}
        if self.phase == CONVERT and self.plan.needs_survey:
            self._embed()
        self.streams.clear()
        for name, tensor in tensors:
            kind, _, rest = name.partition("/")
            if kind == "stream":
                self.streams[rest] = self.stream.hidden_states(tuple(tensor.shape))
                self.streams[rest].data.copy_(tensor)
            else:
                getattr(self.survey, kind)[int(rest)] = tensor

    # -- the work ---------------------------------------------------------------------------------------------------

    def run(self, sink: Sink | None = None, layer_done: Callable[[], None] = lambda: None) -> Quality | None:
        """Both passes, from where the state stands. Returns quality, if it was to be measured.

        Args:
            sink: takes the tensors of every layer of the second pass, converted or not.
            layer_done: called after each layer of either pass.
        """
        if not self.streams and self.next_layer == 0:
            self._embed()
        if self.phase == SURVEY:
            while self.next_layer <= self.plan.layers[-1]:
                self._survey_layer(self.next_layer)
                self._layer_is_done(layer_done)
            self.phase, self.next_layer = CONVERT, 0
            self._embed()
        while self.next_layer < self.reader.num_layers:
            if not self.by_layer:
                self._layer(self.next_layer, sink)
                self._layer_is_done(layer_done)
                continue
            end = min(self.next_layer + self.group.size, self.reader.num_layers)
            failure = None
            try:
                if self.next_layer + self.group.rank < end:
                    self._layer(self.next_layer + self.group.rank, sink)
            except (UserError, OSError) as error:
                failure = error
            self.next_layer = end - 1
            self._exchange(failure)
            self._layer_is_done(layer_done)
        return self._quality()

    def _exchange(self, failure: Exception | None) -> None:
        """Tell the other processes of the layers that this one has converted; what failed in one fails in all."""
        mine = (failure, self.survey.labels, self.digests, self.layer_reports)
        for failed, labels, digests, reports in self.group.gather(mine):
            if failed is not None:
                raise failed
            self.survey.labels |= labels
            self.digests |= digests
            known = {report["layer"] for report in self.layer_reports}
            self.layer_reports += [report for report in reports if report["layer"] not in known]
        self.layer_reports.sort(key=lambda report: report["layer"])

    def _layer_is_done(self, layer_done: Callable[[], None]) -> None:
        self.next_layer += 1
        _return_memory()
        layer_done()

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        with self.watch("reading"):
            tensors = self.reader.read(self.reader.layer_names(index))
            if index + 1 < self.reader.num_layers:
                self.reader.prefetch(self.reader.layer_names(index + 1))
        return tensors

    def _survey_layer(self, index: int) -> None:
        layer = self.stream.build_layer(index, self._read(index))
        if index in self.plan.layers:
            survey_layer(self, layer, index, self.streams[CALIBRATION], self.survey)
        else:
            with self.watch("calibration"):
                self.stream.run_all(layer, index, self.streams[CALIBRATION], exact=False)

    def _layer(self, index: int, sink: Sink | None) -> None:
        chosen = index in self.plan.layers
        if index > self.plan.layers[-1]:
            self.streams.pop(CALIBRATION, None)
        tensors = self._read(index)
        layer = self.stream.build_layer(index, tensors) if chosen or self.streams else None
        if DENSE in self.streams:
            with self.watch("measuring"):
                if chosen:
                    for k in self.plan.measured_k:
                        self.streams.setdefault(f"k={k}", self.streams[DENSE].copy(self.stream))
                self.stream.run_all(layer, index, self.streams[DENSE])
        if chosen:
            if sink:
                with self.watch("reading"):
                    self.digests[index] = digest_ffn(self.reader.ffn_tensors(index), tensors)
            tensors |= self._convert_layer(layer, index, tensors)
        elif CALIBRATION in self.streams:
            with self.watch("calibration"):
                self.stream.run_all(layer, index, self.streams[CALIBRATION], exact=False)
        with self.watch("measuring"):
            self._measure_layer(layer, index, chosen)
        if sink:
            with self.watch("writing"):
                sink(index, tensors)

    def _convert_layer(self, layer: nn.Module, index: int, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Turn the layer into its Emergent MoE; the tensors that replace the source's, or are new. In `tensors` the
        reordered ones take the place of the source's."""
        if index not in self.survey.labels:
            with self.watch("clustering"):
                self.survey.labels[index] = torch.as_tensor(split_neurons(self, layer, index, None))
        labels_F = self.survey.labels[index]
        ffn = make_sparse(layer, self.emoe_config)
        with self.watch("reordering"):
            moved = reordered(self.plan, index, tensors, labels_F)
            error = put_in_order(layer, ffn, self.reader.layer_prefix(index), moved)
            tensors |= moved
            let_go_of_file(layer, tensors, moved)
        self.layer_reports.append({"layer": index, **self.survey.reports.get(index, {}), "all_experts_error": error})
        if self._shares is None:
            self._shares = self.survey.shares(self.plan.layers, self.config.experts)
        self.layer_reports[-1]["share"] = round(self._shares[index][self.plan.top_k - 1].item(), 4)
        states = self.streams.get(CALIBRATION)
        if self.plan.needs_fit:
            moved |= self._fit(layer, ffn, index, states, tensors)
        elif self.config.gate == ORACLE:
            let_oracle_choose(ffn, self.config.experts)
        ffn.router.top_k = self.plan.top_k
        path = self.reader.layer_prefix(index) + (f"{self.reader.spec.ffn}." if self.reader.spec.ffn else "")
        return moved | {f"{path}router.{name}": b.cpu() for name, b in ffn.router.named_buffers()}

    def _fit(self, layer, ffn, index, states, tensors) -> dict[str, torch.Tensor]:
        """Fit the layer's router, and its outputs if that is wanted; advance the text. Returns the tensors refitted."""
        found: dict[str, torch.Tensor] = {}
        converted, adds = self.plan.prefix == "converted", self.reader.spec.adds_output
        with self.watch("gate"):
            before = states.copy(self.stream) if converted and not adds else None
            fit = RouterFit(self.stream, ffn, self.plan, self.group, self._shares[index])
            fit.run(layer, index, states)
            if self.config.gate == ORACLE:
                let_oracle_choose(ffn, self.config.experts)
        if self.config.refit_outputs:
            with self.watch("refitting"):
                names = {kind: name for name, (role, kind) in self.reader.ffn_tensors(index).items() if role == "down"}
                for kind, tensor in refit_output(fit, states).items():
                    found[names[kind]] = tensor.cpu().to(tensors[names[kind]].dtype)
        with self.watch("calibration"):
            if self.config.compensate:
                fit.compensate()
            if converted and adds:
                fit.make_sparse(states)
            elif converted:
                with torch.inference_mode():
                    states.data.copy_(before.data)
                self.stream.run_all(layer, index, states, exact=False)
        return found

    def _measure_layer(self, layer: nn.Module, index: int, chosen: bool) -> None:
        """Advance the converted streams, and note how many experts tokens got and how evenly they were used."""
        ffn = next(m for m in layer.modules() if isinstance(m, SparseFFN)) if chosen else None
        for k in self.plan.measured_k:
            if f"k={k}" not in self.streams:
                continue
            if ffn is None:
                self.stream.run_all(layer, index, self.streams[f"k={k}"])
                continue
            ffn.router.top_k = k
            counts = Load(self.config.experts)
            hook = ffn.router.register_forward_hook(
                lambda _, __, routing, counts=counts: counts.add(routing.experts_NK)
            )
            self.stream.run_all(layer, index, self.streams[f"k={k}"])
            hook.remove()
            self.group.total(*counts.tensors)
            self.loads[k].merge(counts)
            if k == self.plan.top_k:
                self.layer_reports[-1]["load"] = counts.summary()

    # -- the end ----------------------------------------------------------------------------------------------------

    def _ffn_flops(self, active: float) -> float:
        """Multiplications of converted FFNs with their gates, relative to dense."""
        width, c = self.reader.config.hidden_size, self.config
        dense = (3 if self.reader.spec.gated else 2) * width * self.plan.num_neurons
        rows = 2 if c.gate == "representative" and self.reader.spec.gated else 1
        return active + rows * width * c.experts / dense

    def _quality(self) -> Quality | None:
        if DENSE not in self.streams:
            return None
        with self.watch("measuring"):
            if self.stream.measure != "hidden-state error":
                self.stream.load_ends()
            active = {k: self.loads[k].active for k in self.plan.measured_k}
            quality = measure_streams(
                self.stream,
                self.seen,
                self.labels,
                self.streams[DENSE],
                {k: self.streams[f"k={k}"] for k in self.plan.measured_k},
                self.domains,
                list(self.blocks.held_out),
                active,
                {k: self._ffn_flops(active[k]) for k in active},
                self.group.total,
            )
            self.stream.drop_ends()
        return quality


def _return_memory() -> None:
    """Hand freed memory back to the system: glibc would keep up to 90 MB of it."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
