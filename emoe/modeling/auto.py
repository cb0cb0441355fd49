"""Which transformers Auto classes know our models, and the names that a config.json needs for them."""

from __future__ import annotations

from typing import Any

from emoe.families import FAMILIES

AUTO_CLASSES = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
}
"""Auto class → transformers' table from stock model_type to stock class name."""


def stock_classes(model_type: str) -> dict[str, str]:
    """Auto class → stock class name, for the Auto classes that know this stock ``model_type``."""
    from transformers.models.auto import modeling_auto

    found = {auto: getattr(modeling_auto, table).get(model_type) for auto, table in AUTO_CLASSES.items()}
    return {auto: name for auto, name in found.items() if isinstance(name, str)}


def stock_config_class(model_type: str) -> type:
    """The stock configuration class of a ``model_type``."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def emoe_config_class(model_type: str) -> type:
    """Our configuration class of a stock ``model_type``."""
    from emoe.modeling import configuration_emoe

    return getattr(configuration_emoe, configuration_emoe.PREFIX + stock_config_class(model_type).__name__)


def emoe_model_class(stock_name: str) -> type:
    """Our model class for a stock class name such as ``LlamaForCausalLM``."""
    from emoe.modeling import modeling_emoe

    return getattr(modeling_emoe, modeling_emoe.PREFIX + stock_name)


def auto_map(model_type: str) -> dict[str, str]:
    """The ``auto_map`` of a converted checkpoint: with it the Auto classes load it without `emoe` installed."""
    entries = {"AutoConfig": f"configuration_emoe.{emoe_config_class(model_type).__name__}"}
    for auto, stock in stock_classes(model_type).items():
        entries[auto] = f"modeling_emoe.EMoE{stock}"
    return entries


def register() -> None:
    """Make transformers' Auto classes know our models, converted families and ModuleFormer, without remote code.

    Nothing is imported or built for it: this runs in the middle of transformers' own imports. Configurations are
    entered by name, as transformers enters its own; the model classes of a family follow when its first configuration
    is made, which `from_pretrained` does before it looks for a model class.
    """
    from transformers.models.auto import configuration_auto

    from emoe.modeling import configuration_emoe

    _register_moduleformer(configuration_auto.CONFIG_MAPPING)
    pending: dict[str, str] = {}
    mapping = configuration_auto.CONFIG_MAPPING
    for model_type in FAMILIES:
        ours = f"emoe_{model_type}"
        mapping._mapping[ours] = configuration_emoe.PREFIX + configuration_auto.CONFIG_MAPPING_NAMES[model_type]
        mapping._modules[ours] = configuration_emoe
        pending[ours] = model_type

    def register_models(config: Any) -> None:
        import transformers

        stock = pending.pop(config.model_type, None)
        for auto, name in stock_classes(stock).items() if stock else ():
            model_class = emoe_model_class(name)
            getattr(transformers, auto).register(model_class.config_class, model_class, exist_ok=True)

    configuration_emoe.EMoEFields.on_create = staticmethod(register_models)


def _register_moduleformer(mapping: Any) -> None:
    """The same for ModuleFormer, whose classes are ours alone; `emoe` itself imports the configuration on first use."""
    import emoe

    mapping._mapping["moduleformer"] = "ModuleFormerConfig"
    mapping._modules["moduleformer"] = emoe


def register_moduleformer_models() -> None:
    """Make the Auto classes know ModuleFormer's models when the first configuration is made; the models' module is not
    imported before, since it may be the one that is importing the configuration."""
    from emoe.modeling.configuration_moduleformer import ModuleFormerConfig

    def register_models() -> None:
        import transformers

        from emoe.modeling import modeling_moduleformer

        ModuleFormerConfig.on_create = None
        for auto, path in modeling_moduleformer.AUTO_MAP.items():
            if auto != "AutoConfig":
                model_class = getattr(modeling_moduleformer, path.split(".")[1])
                getattr(transformers, auto).register(ModuleFormerConfig, model_class, exist_ok=True)

    ModuleFormerConfig.on_create = staticmethod(register_models)
