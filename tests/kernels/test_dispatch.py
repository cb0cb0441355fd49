"""Which implementation runs: the innermost context, else the environment, else what this machine has."""

import subprocess
import sys
import threading
import types

import pytest
import torch

import emoe_kernels
from emoe_kernels import dispatch, use
from emoe_kernels.dispatch import IMPLEMENTATIONS, explain, resolve
from emoe_kernels.experts import expert_ffn, op


@pytest.fixture(autouse=True)
def _a_machine_without_anything(monkeypatch):
    """No environment variable, no compiled extension, nothing decided yet."""
    monkeypatch.delenv("EMOE_KERNELS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delattr(emoe_kernels, "extension", raising=False)
    monkeypatch.setitem(sys.modules, "emoe_kernels.extension", None)
    monkeypatch.setattr(dispatch, "_settled", {})


@pytest.fixture
def extension(monkeypatch):
    """Pretend that there is an extension; `loads` and `status_is` say how it is, `loaded` counts."""
    module = types.ModuleType("emoe_kernels.extension")
    module.loads, module.status_is, module.loaded = True, True, 0

    def load():
        module.loaded += 1
        module.status_is = module.loads
        return module.loads

    module.load = load
    module.status = lambda: types.SimpleNamespace(
        available=module.status_is, detail="built" if module.status_is else "no compiler", path=None
    )
    monkeypatch.setitem(sys.modules, "emoe_kernels.extension", module)
    monkeypatch.setattr(emoe_kernels, "extension", module, raising=False)
    return module


def call(dtype=torch.float32):
    up, down = torch.ones(4, 2, dtype=dtype), torch.ones(2, 4, dtype=dtype)
    return expert_ffn(torch.ones(1, 2, dtype=dtype), torch.zeros(1, 1).long(), up, down, num_experts=2)


def test_default_without_a_compiler_is_portable():
    assert resolve() == "portable"
    name, reason = explain()
    assert name == "portable" and "no C++ extension" in reason


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


@pytest.mark.parametrize("ask", [resolve, explain])
def test_unknown_names_are_rejected_with_the_known_ones(ask, monkeypatch):
    with pytest.raises(ValueError, match=r"name='tritn'.*reference, portable, cpu, triton, auto"):
        use("tritn")  # before entering: the line at fault is the one that raises
    monkeypatch.setenv("EMOE_KERNELS", "fast")
    with pytest.raises(ValueError, match=r"EMOE_KERNELS='fast'.*reference, portable, cpu, triton, auto"):
        ask()


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
        entry = (lambda *a, known=known, **k: called.append(known), op._any)
        monkeypatch.setitem(op._IMPLEMENTATIONS, known, entry)
        monkeypatch.setitem(dispatch._settled, (known, "cpu"), dispatch.Choice(known, "said the test"))
    with use(name):
        call()
    assert called == [name]


# The extension


def test_the_extension_is_built_by_the_first_call_and_by_that_alone(extension):
    assert explain() == ("cpu", "built")
    assert extension.loaded == 0
    assert resolve() == resolve() == "cpu"
    assert extension.loaded == 1
    assert resolve("mps") == "portable"
    assert extension.loaded == 1


def test_an_extension_that_cannot_be_built_leaves_the_portable_path(extension):
    extension.loads = False
    assert resolve() == resolve() == "portable"
    assert explain() == ("portable", "no compiler")
    assert extension.loaded == 1  # one attempt, one warning


@pytest.mark.parametrize("built", [True, False])
def test_an_extension_asked_for_is_there_or_raises(extension, built):
    extension.loads = built
    with use("cpu"):
        if built:
            assert resolve() == "cpu"
        else:
            with pytest.raises(RuntimeError, match=r"'cpu' was asked for on cpu: no compiler"):
                resolve()
        with pytest.raises(ValueError, match=r"'cpu' was asked for on cuda: .*CPU tensors only"):
            resolve("cuda")


def test_tensors_that_the_chosen_one_cannot_take(extension, monkeypatch):
    def supports(x_ND, up_ESD, down_EDS, gate_ESD):
        assert up_ESD.shape == (2, 2, 2) and down_EDS.shape == (2, 2, 2) and gate_ESD is None
        return None if x_ND.dtype == torch.float32 else f"it does not compute in {x_ND.dtype}"

    monkeypatch.setitem(op._IMPLEMENTATIONS, "cpu", (lambda *a, **k: "fast", supports))
    assert call() == "fast"
    assert torch.is_tensor(call(torch.float64))  # auto: the portable path
    with use("cpu"), pytest.raises(ValueError, match=r"'cpu' was asked for, but it does not compute in torch\.float64"):
        call(torch.float64)


def test_tensors_that_the_chosen_one_takes_slowly(extension, monkeypatch):
    def is_slow(x_ND, up_ESD, down_EDS, gate_ESD):
        return x_ND.dtype == torch.float64

    monkeypatch.setitem(op._IMPLEMENTATIONS, "cpu", (lambda *a, **k: "fast", lambda *tensors: None, is_slow))
    assert call() == "fast"
    assert torch.is_tensor(call(torch.float64))  # auto: the portable path
    with use("cpu"):
        assert call(torch.float64) == "fast"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the portable path would break the graph
    assert call(torch.float64) == "fast"


# Triton


@pytest.fixture
def triton_op(monkeypatch):
    """Pretend that Triton and our kernels can be imported."""
    import emoe_kernels.experts as experts

    fake = types.ModuleType("emoe_kernels.experts.triton_op")
    monkeypatch.setitem(sys.modules, "emoe_kernels.experts.triton_op", fake)
    monkeypatch.setattr(experts, "triton_op", fake, raising=False)
    triton = types.ModuleType("triton")
    triton.__version__ = "9.9"
    monkeypatch.setitem(sys.modules, "triton", triton)


def test_a_gpu_runs_triton(triton_op):
    assert explain("cuda") == ("triton", "Triton 9.9")
    assert resolve("cuda") == "triton"


def test_a_gpu_without_triton_runs_the_portable_path(triton_op, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    name, reason = explain("cuda")
    assert name == resolve("cuda") == "portable"
    assert "cannot be imported" in reason
    with use("triton"), pytest.raises(ValueError, match=r"'triton' was asked for on cuda: .* cannot be imported"):
        resolve("cuda")


def test_triton_on_a_cpu_is_only_interpreted(triton_op, monkeypatch):
    with use("triton"):
        with pytest.raises(ValueError, match=r"'triton' was asked for on cpu: .* need a GPU; TRITON_INTERPRET=1"):
            resolve()
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert resolve() == "triton"
        assert "tests only" in explain().reason
    assert resolve() == "portable"  # never of its own accord


# What surrounds the implementations


def test_compiled_functions_contain_checks_and_dispatch(monkeypatch):
    """fullgraph: neither the checks nor the choice break the graph."""
    monkeypatch.setitem(op._IMPLEMENTATIONS, "portable", (lambda x_ND, *a, **k: x_ND + 1, op._any))
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def f(x_ND, experts_NK, up_FD, down_DF, bias_F, weights_NK):
        dense = expert_ffn(
            x_ND,
            experts_NK,
            up_FD,
            down_DF,
            num_experts=2,
            gate_FD=up_FD,
            up_bias_F=bias_F,
            gate_bias_F=bias_F,
            weights_NK=weights_NK,
        )
        stacked = expert_ffn(x_ND, experts_NK, up_FD.view(2, 2, 2), down_DF.view(2, 2, 2))
        return dense + stacked

    x_ND = torch.zeros(1, 2)
    y = f(x_ND, torch.zeros(1, 1).long(), torch.ones(4, 2), torch.ones(2, 4), torch.ones(4), torch.ones(1, 1))
    assert torch.equal(y, torch.full((1, 2), 2.0))


def test_importing_the_kernels_imports_no_compiler():
    """Neither Triton nor Inductor nor transformers: they take seconds, and a model may run without them."""
    heavy = "('triton', 'transformers', 'torch._dynamo', 'torch.utils.cpp_extension')"
    code = f"import sys, emoe_kernels.experts, emoe_kernels.linear; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.stdout.strip() == "[]", done.stderr


def _environment():
    import os
    from pathlib import Path

    return os.environ | {"PYTHONPATH": str(Path(emoe_kernels.__file__).parents[1])}
