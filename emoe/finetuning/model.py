"""The model that an arm starts from: the same weights, head and order of neurons for every arm.

All arms are one class. A dense arm is the converted model with all experts on, whose FFN is the stock arithmetic on the
stock weights (`ffn_emoe.SparseFFN.ffn`): it trains bit for bit like the stock class (tests/finetune/test_arms.py).

Legend: E experts, K experts a token uses.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import emoe
from emoe.calibration.text import read_tokenizer
from emoe.checkpoint.companions import check_companions
from emoe.checkpoint.converted import SOURCE_S
from emoe.checkpoint.reader import read_json
from emoe.conversion.convert import Progress
from emoe.distributed import Group
from emoe.errors import UserError
from emoe.families import family
from emoe.finetuning.arms import Arm
from emoe.finetuning.settings import FinetuneConfig
from emoe.modeling.modeling_emoe import EMoEModelMixin
from emoe.modeling.routing_emoe import WEIGHING, Router
from emoe.runtime import write_text
from emoe.tasks.spec import Task

HEADS = {"classification": "ForSequenceClassification", "regression": "ForSequenceClassification"}
"""Kind of task → end of the class name; instructions take the language model's own head."""

_CUT = ("experts", "layers", "split", "active", "split_seed", "gate")
"""Settings that speak of cutting a dense model, and mean nothing to a converted one."""


@dataclass(frozen=True)
class Start:
    """A model before its first step."""

    model: EMoEModelMixin
    top_k: int
    """K of the arm's partners: of a dense arm, too, what `emoe` readings use."""
    head: list[str]
    """Names of the modules that are drawn afresh or lie outside the base model; none for instructions."""


def converted_folder(config: FinetuneConfig, work: Path, texts: list[str], group: Group, progress: Progress) -> Path:
    """The converted checkpoint to start from: the one that was given, or a dense one cut into experts below ``work``.

    Gates and splits that look at text are fitted on the training texts. Every arm, vanilla too, starts from here.

    Raises:
        UserError: no such model, or settings that do not fit it.
    """
    given = Path(config.model)
    if (given / "config.json").is_file():
        facts = read_json(given / "config.json")
        if str(facts.get("model_type", "")).startswith("emoe_"):
            _check_converted(config, facts)
            check_companions(given)
            return given
    target, sample = work / "base", work / "texts.txt"
    group.first_then_all(lambda: sample.write_text("\n".join(texts), encoding="utf-8"))
    try:
        _cut(config, target, sample, progress)  # all processes share this work
    except UserError as error:
        if str(error).startswith("--calibration"):
            raise UserError(
                f"--gate {config.gate}, --split {config.split}: the training texts are too few to fit them; give a "
                "converted model, or average-key and weights, which need none"
            ) from None
        raise
    group.first_then_all(lambda: _name_texts(target / "emoe_config.yaml", sample, config.task))
    return target


def _name_texts(settings: Path, sample: Path, task: str) -> None:
    """Tuned models keep the settings of their conversion: these must not name a file that is gone by then."""
    text = settings.read_text(encoding="utf-8")
    write_text(settings, text.replace(str(sample), f"training texts of {task}"))


def _check_converted(config: FinetuneConfig, facts: dict[str, Any]) -> None:
    if facts.get("emoe_copies") or facts.get("emoe_gate") in WEIGHING:
        raise UserError("--model: this model has a trained gate already; give the converted model it was made from")
    if (facts.get("emoe_provenance") or {}).get("outputs", SOURCE_S) != SOURCE_S:
        raise UserError("--model: its outputs were refitted, so the dense model is not inside; convert it without that")
    groups = facts.get("emoe_groups") or []
    if any(len(group) > 1 for group in groups) and config.method != "emoe":
        raise UserError(f"--method {config.method}: this model has added experts, which only emoe tunes; remove them")
    if groups and config.method == "gmoe":
        raise UserError("--method gmoe: experts of this model were pruned, an FFN cannot be copied; give it unpruned")
    agreed = {"gate": facts.get("emoe_gate", "average-key"), "experts": facts.get("num_experts")}
    given = [k for k in _CUT if k in config.model_fields_set and getattr(config, k) != agreed.get(k)]
    if given:
        flags = ", ".join("--" + key.replace("_", "-") for key in given)
        raise UserError(f"{flags}: the model is cut into experts already; leave out, or give the dense model")


def _cut(config: FinetuneConfig, target: Path, sample: Path, progress: Progress) -> None:
    emoe.convert(
        config.model,
        output=target,
        preset="finetune",
        experts=config.experts,
        top_k=config.top_k,
        active=config.active,
        layers=config.layers,
        split=config.split,
        gate=config.gate,
        seed=config.split_seed,
        routing="top-k",
        allocation="uniform",
        calibration=[str(sample)],
        held_out_tokens=0,
        progress=lambda stage, done, total: progress(f"cutting: {stage}", done, total),
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer, padding on the right with a token that it has."""
    tokenizer = read_tokenizer(folder)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"--model: the tokenizer of {folder} has neither a padding token nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build(config: FinetuneConfig, arm: Arm, folder: Path, task: Task, pad_token_id: int, seed: int) -> Start:
    """The arm's model in fp32, its new parameters drawn from ``seed`` and their names alone.

    Raises:
        UserError: K is not between 1 and E, the model has another head, or is no language model.
    """
    facts = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    top_k = _top_k(config, facts)
    facts.pad_token_id = pad_token_id
    facts.use_cache = False
    if arm.routing:
        facts.emoe_routing, facts.emoe_allocation = arm.routing, "uniform"
    if arm.gate and not arm.copied:
        facts.emoe_gate = arm.gate
    facts.num_experts_per_tok = top_k if arm.sparse and not arm.copied else facts.num_experts
    model, missing = _load(folder, facts, task)
    head = _head(model, missing) if task.kind != "instructions" else []
    if arm.copied:
        missing |= _copy(model, config)
        top_k = config.copies_top_k
    _draw({name: p for name, p in model.named_parameters() if name in missing and p.ndim > 1}, seed)
    return Start(model, top_k, head)


def _top_k(config: FinetuneConfig, facts: Any) -> int:
    top_k = config.top_k or facts.num_experts_per_tok
    if top_k > facts.num_experts:
        raise UserError(f"--top-k: {top_k} is more than the model's {facts.num_experts} experts")
    if config.copies_top_k > config.copies:
        raise UserError(f"--copies-top-k: {config.copies_top_k} is more than --copies {config.copies}")
    return top_k


def _load(folder: Path, facts: Any, task: Task) -> tuple[EMoEModelMixin, set[str]]:
    if task.kind == "instructions":
        if family(facts.emoe_source["family"]).encoder:
            raise UserError(f"--model: {folder.name} is an encoder; instructions are for causal language models")
        auto = transformers.AutoModelForCausalLM
    else:
        auto = transformers.AutoModelForSequenceClassification
        labels = task.labels or ("score",)
        own = [name for name in facts.architectures or [] if name.endswith(HEADS[task.kind])]
        if own and facts.num_labels != len(labels):
            raise UserError(
                f"--task: '{task.name}' has {len(labels)} labels, the model's head has {facts.num_labels}; "
                "they do not match, give the base model"
            )
        facts.num_labels = len(labels)
        facts.id2label = dict(enumerate(labels))
        facts.label2id = {label: index for index, label in enumerate(labels)}
        facts.problem_type = "regression" if task.kind == "regression" else "single_label_classification"
    model, info = auto.from_pretrained(
        folder, config=facts, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    return model, set(info["missing_keys"])


def _head(model: nn.Module, missing: set[str]) -> list[str]:
    """Modules with parameters outside the base model, and drawn ones inside it that are no gate's."""
    outside = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters() if not name.startswith(outside) or name in missing]
    return sorted({name.rpartition(".")[0] for name in names if ".router." not in name})


def _copy(model: EMoEModelMixin, config: FinetuneConfig) -> set[str]:
    """Turn the experts into copies of the whole FFN, with a new cosine gate; returns the names of what is new."""
    facts = model.config
    facts.emoe_copies = facts.num_experts = config.copies
    facts.num_experts_per_tok, facts.emoe_gate = config.copies_top_k, "cosine"
    facts.emoe_shared_experts = facts.emoe_compensation = 0  # of the experts that are no more
    for ffn in model.sparse_ffns().values():
        ffn.widen(config.copies)
        ffn.num_experts = config.copies
        ffn.router = Router(facts, facts.hidden_size)
    return {name for name, _ in model.named_parameters() if ".router." in name}


def _draw(parameters: dict[str, nn.Parameter], seed: int) -> None:
    """Fill matrices from normal distributions of deviation 0.02, each with a generator of its own.

    Thus a head is the same in every arm, whatever else an arm has to draw.
    """
    for name, parameter in parameters.items():
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def hide_neurons(model: nn.Module, rate: float) -> list[Any]:
    """The dropout control: neurons of the converted layers are zeroed with this rate in training, the rest scaled up.

    Returns the hooks, to be removed after training. Called after adapters are in place, so that those see it, too.
    """

    def drop(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (nn.functional.dropout(inputs[0], rate, module.training),)

    ffns = model.sparse_ffns().values()
    return [ffn.linear("down").register_forward_pre_hook(drop) for ffn in ffns]


def attention_linears(model: EMoEModelMixin, ffn: bool) -> list[str]:
    """Full names of the linears in the layers: those of attention and, with ``ffn``, of the FFNs."""
    spec = family(model.config.emoe_source["family"])
    roles = [getattr(spec, role) for role in ("gate", "up", "down") if getattr(spec, role)]
    inner = "|".join(re.escape(f"{spec.ffn}.{role}".lstrip(".")) for role in roles)
    layer = re.compile(rf"(^|\.){re.escape(spec.layers)}\.\d+\.(?P<rest>.+)$")
    names = []
    for name, module in model.named_modules():
        found = layer.search(name)
        if found and type(module) in (nn.Linear, transformers.pytorch_utils.Conv1D) and ".router." not in name:
            in_ffn = re.fullmatch(inner, found["rest"]) is not None
            if ffn or not in_ffn:
                names.append(name)
    return names
