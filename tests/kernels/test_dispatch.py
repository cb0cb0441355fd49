"""Which implementation runs: the innermost context, else the environment, else the sparse one."""

import threading

import pytest
import torch

from emoe_kernels import use
from emoe_kernels.dispatch import IMPLEMENTATIONS, resolve
from emoe_kernels.experts import expert_ffn, op


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("EMOE_KERNELS", raising=False)


def test_default_is_sparse():
    assert resolve() == "portable"


def test_contexts_nest_and_end_with_an_exception():
    with use("reference"):
        assert resolve() == "reference"
        with pytest.raises(KeyError), use("portable"):
            assert resolve() == "portable"
            raise KeyError
        assert resolve() == "reference"
    assert resolve() == "portable"


def test_one_context_object_can_be_entered_within_itself():
    reference = use("reference")
    with reference, reference:
        assert resolve() == "reference"
    assert resolve() == "portable"


def test_environment_then_context(monkeypatch):
    monkeypatch.setenv("EMOE_KERNELS", "reference")
    assert resolve() == "reference"
    with use("auto"):
        assert resolve() == "portable"
    monkeypatch.setenv("EMOE_KERNELS", "")
    assert resolve() == "portable"


def test_unknown_names_are_rejected_with_the_known_ones(monkeypatch):
    with pytest.raises(ValueError, match=r"name='tritn'.*reference, portable, auto"):
        use("tritn")  # before entering: the line at fault is the one that raises
    monkeypatch.setenv("EMOE_KERNELS", "fast")
    with pytest.raises(ValueError, match=r"EMOE_KERNELS='fast'.*reference, portable, auto"):
        resolve()


def test_a_thread_does_not_see_the_choice_of_another():
    seen = []
    with use("reference"):
        thread = threading.Thread(target=lambda: seen.append(resolve()))
        thread.start()
        thread.join()
    assert seen == ["portable"]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_op_calls_what_was_chosen(name, monkeypatch):
    called = []
    for known in IMPLEMENTATIONS:
        monkeypatch.setitem(op._IMPLEMENTATIONS, known, lambda *a, known=known, **k: called.append(known))
    with use(name):
        expert_ffn(torch.ones(1, 2), torch.zeros(1, 1).long(), torch.ones(4, 2), torch.ones(2, 4), num_experts=2)
    assert called == [name]
