"""Turn a GGUF file into the plain folder that every other part of emoe reads.

transformers dequantizes a GGUF file through ``gguf_file=`` but marks the result as quantized and then refuses to save
it. So the dequantized weights are moved into a fresh model of the same, plain configuration. The folder holds
float32: what the quantization lost stays lost, and the manifest says so.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from emoe.assets.manifest import discard, is_intact, write_manifest
from emoe.bytecount import Show
from emoe.errors import UserError
from emoe.runtime import atomic_directory, cache_home, require_space, sha256_file

Progress = Callable[[str], None]

_MARKS_OF_ORIGIN = ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version")


def gguf_folder(sha256: str) -> Path:
    """Where the plain folder of the GGUF file with this digest is cached."""
    return cache_home() / "gguf" / sha256[:16]


def cached_gguf(
    path: Path,
    *,
    sha256: str | None = None,
    verify: bool = False,
    progress: Progress | None = None,
    show: Show | None = None,
) -> Path:
    """The plain folder of a GGUF file, imported once and then found by the file's digest.

    Args:
        path: the ``.gguf`` file.
        sha256: its digest when the caller has checked it already; otherwise the file is read once (about 1 s a GB).
        verify: compare the sha256 of the cached folder's files too.
        progress: called with one line when something slow starts.
        show: told how far ``verify`` is, in MiB.

    Raises:
        UserError: see `import_gguf`.
    """
    folder = gguf_folder(sha256 or sha256_file(path))
    if is_intact(folder, verify=verify, show=show):
        return folder
    if folder.exists():
        discard(folder)
    if progress:
        progress(f"turning {path.name} into a float32 folder (once)")
    return import_gguf(path, folder)


def import_gguf(path: Path, output: Path) -> Path:
    """Write ``output`` as a plain folder: config, float32 safetensors, tokenizer, generation config, manifest.

    Memory: the whole model in float32 (4 bytes a parameter) and about as much again while it is dequantized; measured
    1.3 GB and 25 s for 135 M parameters on 2 shared cores. It does not stream: the loader of transformers cannot.

    Raises:
        UserError: not a GGUF file, an architecture or a RoPE that transformers cannot read, or no room on the disk.
    """
    path = Path(path)
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file (its first bytes are not 'GGUF')")
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{path.name}: reading GGUF files needs the package 'gguf': pip install gguf")

    _refuse_scaled_rope(path)

    import torch
    import transformers

    with quiet_loader():
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, trust_remote_code=False
            )
        except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{path.name}: transformers cannot read this GGUF file: {reason}") from error

    config = _plain_config(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = "float32"
    weights = {name: tensor.to(torch.float32) for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        plain = type(model)(config)
    # assign: the parameters become the dequantized tensors themselves, no second copy of the model.
    missing, unexpected = plain.load_state_dict(weights, strict=False, assign=True)
    missing = [name for name in missing if not (config.tie_word_embeddings and name.endswith("lm_head.weight"))]
    if missing or unexpected:
        raise UserError(f"{path.name}: weights missing {missing[:3]} or unexpected {unexpected[:3]} in this GGUF file")
    plain.tie_weights()
    plain.generation_config = _generation_config(config, tokenizer)
    _restore_pre_tokenizer(tokenizer, path)
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    del model

    needed = sum(parameter.numel() * 4 for parameter in plain.parameters())
    require_space(output, needed, "EMOE_HOME")
    with quiet_loader(), atomic_directory(output) as temporary:
        plain.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_manifest(
            temporary,
            source=path.name,
            source_sha256=sha256_file(path),
            note="dequantized from GGUF to float32; differs from the original weights by the quantization error",
        )
    return output


def _refuse_scaled_rope(path: Path) -> None:
    """Raise `UserError` where positions are scaled, as in Llama-3.1: transformers passes over what says so.

    It reads no ``rope_freqs.weight``, in which llama.cpp keeps the factors, and ``rope.scaling`` of GPT-OSS alone.
    """
    import gguf

    try:
        file = gguf.GGUFReader(path)
    except (ValueError, KeyError, OverflowError, IndexError):
        return  # damaged: transformers' complaint says more
    factors = any(tensor.name.startswith(("rope_freqs", "rope_factors")) for tensor in file.tensors)
    kinds = [field.contents() for name, field in file.fields.items() if name.endswith(".rope.scaling.type")]
    if (factors or any(kind != "none" for kind in kinds)) and "gpt-oss.block_count" not in file.fields:
        raise UserError(
            f"{path.name}: its positions are scaled (RoPE), which transformers does not read from a GGUF file; give "
            "the checkpoint in safetensors"
        )


def _plain_config(config: Any) -> Any:
    """The same configuration as a fresh object, without the marks that make transformers call it quantized."""
    import numpy as np

    def shortest(value: Any) -> Any:
        # GGUF keeps float32: 1e-5 comes back as 9.999999747378752e-06. The shortest equal decimal is what was meant.
        if isinstance(value, float):
            return float(str(np.float32(value)))
        if isinstance(value, dict):
            return {key: shortest(inner) for key, inner in value.items()}
        return value

    fields = {key: shortest(value) for key, value in config.to_dict().items() if key not in _MARKS_OF_ORIGIN}
    return type(config).from_dict(fields)


def _generation_config(config: Any, tokenizer: Any) -> Any:
    """Generation defaults whose special tokens are the tokenizer's: the loader leaves them out at times."""
    import transformers

    return transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id,
        eos_token_id=tokenizer.eos_token_id if tokenizer.eos_token_id is not None else config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _restore_pre_tokenizer(tokenizer: Any, path: Path) -> None:
    """Put back the splitting rule that transformers' GGUF loader drops.

    The file names it in ``tokenizer.ggml.pre``. SmolLM splits every digit off first, so that in "x   5" the three
    spaces are one token; without the rule they become two and one, which the model never saw in training.
    """
    import gguf
    from tokenizers import pre_tokenizers

    field = gguf.GGUFReader(path).fields.get("tokenizer.ggml.pre")
    if field is None or field.contents() != "smollm" or not hasattr(tokenizer, "backend_tokenizer"):
        return
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


@contextlib.contextmanager
def quiet_loader() -> Iterator[None]:
    """No progress bars and no "quantized" chatter from transformers; the caller's ``progress`` line says enough."""
    from transformers import modeling_gguf_pytorch_utils as loader
    from transformers.utils import logging

    level, bars, loader_bar = logging.get_verbosity(), logging.is_progress_bar_enabled(), getattr(loader, "tqdm", None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if loader_bar is not None:
        # The dequantizing loop calls tqdm itself, past transformers' own switch.
        loader.tqdm = functools.partial(loader_bar, disable=True)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        if loader_bar is not None:
            loader.tqdm = loader_bar
