"""Turn a pretrained dense Llama or GPT model into its Emergent Mixture-of-Experts.

``import emoe`` also teaches transformers' Auto classes to load converted models, and its mixture-of-experts models
``experts_implementation="emoe"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emoe._on_import import after_import

if TYPE_CHECKING:
    from emoe.api import analyze as analyze
    from emoe.api import compare as compare
    from emoe.api import evaluate as evaluate
    from emoe.api import extend as extend
    from emoe.api import finetune as finetune
    from emoe.api import pretrain as pretrain
    from emoe.api import prune as prune
    from emoe.api import recover as recover
    from emoe.api import tune as tune
    from emoe.config import ConvertConfig as ConvertConfig
    from emoe.conversion.convert import convert as convert
    from emoe.exporting import export as export
    from emoe.modeling.configuration_moduleformer import ModuleFormerConfig as ModuleFormerConfig
    from emoe.modeling.modeling_moduleformer import ModuleFormerForCausalLM as ModuleFormerForCausalLM
    from emoe.modeling.modeling_moduleformer import (
        ModuleFormerForSequenceClassification as ModuleFormerForSequenceClassification,
    )
    from emoe.modeling.modeling_moduleformer import ModuleFormerModel as ModuleFormerModel

__version__ = "0.1.0"


def _register() -> None:
    from emoe.modeling.auto import register

    register()


def _register_experts() -> None:
    import emoe_kernels.integrations.transformers  # noqa: F401 - registers itself


def _register_moduleformer() -> None:
    from emoe.modeling.auto import register_moduleformer_models

    register_moduleformer_models()


after_import("transformers.models.auto.configuration_auto", _register)
after_import("transformers.integrations.moe", _register_experts)
after_import("emoe.modeling.configuration_moduleformer", _register_moduleformer)

_LAZY = {
    "convert": "emoe.conversion.convert",
    "ConvertConfig": "emoe.config",
    "export": "emoe.exporting",
    **dict.fromkeys(
        ("finetune", "evaluate", "compare", "recover", "tune", "analyze", "prune", "extend", "pretrain"), "emoe.api"
    ),
    "ModuleFormerConfig": "emoe.modeling.configuration_moduleformer",
    "ModuleFormerModel": "emoe.modeling.modeling_moduleformer",
    "ModuleFormerForCausalLM": "emoe.modeling.modeling_moduleformer",
    "ModuleFormerForSequenceClassification": "emoe.modeling.modeling_moduleformer",
}


def __getattr__(name: str):
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'emoe' has no attribute {name!r}")
