"""Emergent Mixture-of-Experts: a stock transformers model whose FFNs compute only the experts chosen for a token.

Source: Qiu, Huang, Fu, "Unlocking Emergent Modularity in Large Language Models" (NAACL 2024, arXiv 2310.10908), sec. 3.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen.

The weights stay where the source has them (``mlp.gate_proj.weight`` and so on), reordered so that expert e is the block
of neurons e*S … (e+1)*S. Nothing trainable is added: a gate is derived from the weights, or is a table in a buffer.
``EMoELlamaForCausalLM`` is ``LlamaForCausalLM`` with sparse FFNs; likewise for every other stock class. The classes are
made on first use, by name, so that one file serves every family. Three exceptions: the gate "softmax", a table too, is
trained and weighs the experts; "cosine", a baseline in fine-tuning, does the same with parameters of its own; and with
``emoe_copies`` an expert is a copy of the whole FFN (GMoE). This file and those that it imports are copied beside each
converted checkpoint and need nothing but torch and transformers; with ``emoe_kernels`` installed they run on those
kernels.
"""

import shutil
import sys
from pathlib import Path

import transformers
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import cached_file, logging

from . import configuration_emoe, ffn_emoe, routing_emoe
from .configuration_emoe import PREFIX
from .ffn_emoe import SparseFFN, make_sparse

logger = logging.get_logger(__name__)


class EMoEModelMixin:
    """Mixed into a stock model class: the layers in ``config.emoe_layers`` get sparse FFNs."""

    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012 - transformers wants a list

    def __init__(self, config, *args, **kwargs):
        # `from_pretrained(..., num_experts_per_tok=K)` sets K after the configuration has checked itself
        _check_top_k("num_experts_per_tok", config.num_experts_per_tok, config)
        super().__init__(config, *args, **kwargs)
        base = getattr(self, self.base_model_prefix, self)
        layers = base.get_submodule(config.emoe_ffn["layers"])
        for place, index in enumerate(config.emoe_layers):
            if not any(isinstance(m, SparseFFN) for m in layers[index].modules()):  # a head may wrap our own base model
                make_sparse(layers[index], config, config.emoe_groups[place] if config.emoe_groups else None)
        if self._no_split_modules:  # layers of the families that hold the FFN inline have got a new class name
            self._no_split_modules = [*self._no_split_modules, *(PREFIX + name for name in self._no_split_modules)]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As transformers', but no tensor of a router stays a view of the file.

        They stay fp32 in a model of 16 bits, and one view keeps all its file mapped: 410 MiB for SmolLM2 in fp32.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info a tuple
        for ffn in model.sparse_ffns().values():
            ffn.router._apply(lambda tensor: tensor.clone() if tensor.device.type == "cpu" else tensor)
        return loaded

    def sparse_ffns(self) -> dict[int, SparseFFN]:
        """The converted FFNs by layer index."""
        found = [module for module in self.modules() if isinstance(module, SparseFFN)]
        return dict(zip(self.config.emoe_layers, found, strict=True))

    def set_top_k(self, top_k: int) -> None:
        """Use `top_k` experts a token from now on; at ``num_experts`` the model is the dense model.

        Where the number differs by token or layer, `top_k` is the average that calibration text had.

        Raises:
            ValueError: `top_k` is no whole number between 1 and ``config.num_experts``.
        """
        _check_top_k("top_k", top_k, self.config)
        self.config.num_experts_per_tok = top_k
        for ffn in self.sparse_ffns().values():
            ffn.router.top_k = top_k

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As transformers', plus the modelling files and the partition, so that the copy loads everywhere too."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        for file in code_files():
            shutil.copyfile(file, target / file.name)
        for name in ("partition.safetensors", "emoe_config.yaml"):
            found = cached_file(self.config._name_or_path, name, _raise_exceptions_for_missing_entries=False)
            if found is None:
                logger.warning(f"{name} was not found in {self.config._name_or_path}: the copy has none")
            elif Path(found).resolve() != (target / name).resolve():
                shutil.copyfile(found, target / name)
        super().save_pretrained(save_directory, *args, **kwargs)


def _check_top_k(name: str, top_k, config) -> None:
    if not isinstance(top_k, int) or isinstance(top_k, bool):
        raise ValueError(f"{name}={top_k!r} must be a whole number")
    if not 1 <= top_k <= config.num_experts:
        raise ValueError(f"{name}={top_k} must lie between 1 and num_experts={config.num_experts}")


def code_files() -> list[Path]:
    """The Python files that a converted checkpoint carries: these four and the kernels' portable path."""
    modules = (configuration_emoe.__name__, routing_emoe.__name__, ffn_emoe.__name__, __name__)
    own = [Path(sys.modules[module].__file__) for module in modules]
    return [*own, Path(sys.modules[ffn_emoe.expert_ffn.__module__].__file__).with_name("portable.py")]


def _share_renamings(name: str, stock: type) -> None:
    """Old checkpoints' tensor names are translated by transformers per class; ours are spelt as the source's."""
    found = get_checkpoint_conversion_mapping(stock.__name__)
    found = found or get_checkpoint_conversion_mapping(stock.config_class.model_type)
    if found:
        register_checkpoint_conversion_mapping(name, found, overwrite=True)


def _model_class(name: str) -> type:
    stock = getattr(transformers, name.removeprefix(PREFIX))
    _share_renamings(name, stock)
    config_class = getattr(configuration_emoe, PREFIX + stock.config_class.__name__)
    namespace = {
        "config_class": config_class,
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with sparse FFNs; see `EMoEModelMixin`.",
    }
    return type(name, (EMoEModelMixin, stock), namespace)


def __getattr__(name: str) -> type:
    if not name.startswith(PREFIX) or not hasattr(transformers, name.removeprefix(PREFIX)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = _model_class(name)
    return globals()[name]
