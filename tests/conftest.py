"""Shared fixtures: quiet libraries, two threads (one for each of two workers), tiny checkpoints of every family."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `support` is imported by tests in every folder
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:  # a core each, subprocesses included: threads that wait for each other spin
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


@pytest.fixture(autouse=True)
def _quiet_libraries():
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


LONGEST = ("test_laws_on_real_models.py", "test_triton_compile.py", "test_stream.py", "test_triton.py", "test_kills.py")
"""Files of minutes: begun first, so that no worker is left alone with one at the end."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Some pages of text that the tiny tokenizer knows."""
    from support.tiny import TEXT

    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = TEXT.split()
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(len(words), (4000,), generator=generator)
    path.write_text(" ".join(words[i] for i in order))
    return path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A tiny dense Llama checkpoint."""
    from support.tiny import tiny_checkpoint

    return tiny_checkpoint(tmp_path_factory.mktemp("dense") / "llama", "llama")


@pytest.fixture(scope="session")
def settings(text_file) -> dict:
    """Settings that convert a tiny model in a second."""
    return {
        "experts": 8,
        "top_k": 3,
        "calibration": [str(text_file)],
        "calibration_tokens": 2048,
        "held_out_tokens": 256,
        "sequence_length": 64,
        "checkpoint_seconds": 0,
    }


@pytest.fixture(scope="session")
def converted_llama(tiny_llama, settings, tmp_path_factory) -> Path:
    """The tiny Llama, converted with the default split and gate."""
    import emoe

    output = tmp_path_factory.mktemp("converted") / "llama"
    emoe.convert(str(tiny_llama), output=output, **settings)
    return output


@pytest.fixture
def free_port() -> int:
    """A TCP port for processes that meet."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
