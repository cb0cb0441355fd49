"""Settings of the commands: one class gives the YAML file, the command's flags and the Python function their fields.

Precedence: defaults, then the preset (of `emoe convert`), then ``--config``, then flags. Those of `emoe finetune` and
`emoe eval` are in `emoe.finetuning.settings`.
"""

from emoe.config.base import CORPUS_NAMES, SEEDS, Settings, setting
from emoe.config.conversion import ConvertConfig
from emoe.config.merging import (
    DEFAULT_PRESET,
    WHY_DEFAULT_PRESET,
    flag_of,
    merge_settings,
    presets,
    read_config_file,
    resolve_config,
)
from emoe.config.surgery import COUNTING, FITTING, AnalyzeConfig, ExtendConfig, PruneConfig
from emoe.config.training import PretrainConfig, RecoverConfig, TuneConfig, loss_factors

__all__ = [
    "CORPUS_NAMES",
    "COUNTING",
    "DEFAULT_PRESET",
    "FITTING",
    "SEEDS",
    "WHY_DEFAULT_PRESET",
    "AnalyzeConfig",
    "ConvertConfig",
    "ExtendConfig",
    "PretrainConfig",
    "PruneConfig",
    "RecoverConfig",
    "Settings",
    "TuneConfig",
    "flag_of",
    "loss_factors",
    "merge_settings",
    "presets",
    "read_config_file",
    "resolve_config",
    "setting",
]
