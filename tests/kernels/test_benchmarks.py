"""The benchmark: a wrong implementation gets no figure, rows keep their form, a run goes on where it stopped.

Legend: N tokens, D model width, F hidden width, E experts, S = F // E neurons per expert, K experts chosen per token.
"""

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.scripts import script

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "benchmarks"))

import cases
import measure
import memory
import registry
import results
import run
import stickbreaking
from cases import Case, Shape
from measure import Outcome, Pass

ROOT = Path(__file__).parents[2]
TINY = Shape(width=32, hidden=128, experts=8, chosen=2)  # S = 16: 32 bytes in bf16, which grouped_mm takes
SHORT = ["--budget", "0.01", "--memory-tokens", "0", "--threads", "1"]
FLAGS = ["--shape", "32x128", "--experts", "8", "--fraction", "1/4", *SHORT]
FIELDS = {
    *("shape", "tokens", "dtype", "pass", "impl", "ratio_to_dense", "ideal", "ratio_of_minima", "median_ms", "min_ms"),
    *("iqr_ms", "dense_ms", "rounds", "check_error", "error", "skipped", "union", "peak_mib", "peak_again_mib"),
    *("threads", "seed", "routing", "cache", "torch", "hardware", "commit"),
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Two threads on tiny shapes wait for each other, the longer the busier the machine is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def outcomes_of(case, implementations, shape=TINY, clock=measure.one_pass, **settings):
    weights = cases.make_weights(shape.width, shape.hidden, seed=0)
    inputs = cases.make_inputs(shape, case.tokens, 0, None)
    expected = cases.reference(weights, inputs, shape.experts, gradients=True)
    layer = cases.make_layer(weights, shape.experts, case.dtype)
    settings = {"budget": 0.001, "memory_limit": 1.0, "patience": measure.Patience()} | settings
    return measure.measure_case(case, implementations, layer, inputs, expected, clock=clock, **settings)


def altered(name, alter):
    """The implementation called `name`, with `alter` behind its forward pass."""
    honest = registry.by_name()[name]

    def prepare(layer):
        runner = honest.prepare(layer)
        return runner._replace(call=lambda x, experts: alter(runner.call(x, experts)))

    return honest._replace(name="altered", prepare=prepare)


class _ForgetsGradient(torch.autograd.Function):
    """Right forward, wrong backward."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.01


def crash(y):
    raise RuntimeError("no  such\nkernel")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("pass_", ["fwd", "fwdbwd"])
def test_every_implementation_is_right(dtype, pass_):
    found = outcomes_of(Case(TINY, 9, dtype, pass_), list(registry.IMPLEMENTATIONS))
    assert list(found) == [i.name for i in registry.IMPLEMENTATIONS]
    for name, outcome in found.items():
        assert outcome.error is None, (name, outcome.error)
        assert outcome.ratio_to_dense > 0
        assert name == "dense" or outcome.check_error <= measure.TOLERANCES[dtype]
    assert found["dense"].ratio_to_dense == 1


@pytest.mark.parametrize(
    ("alter", "pass_", "complaint"),
    [
        (lambda y: y * 1.001, "fwd", "wrong result"),
        (lambda y: torch.where(torch.arange(len(y))[:, None] == 3, torch.nan, y), "fwd", "wrong result"),
        (lambda y: y[:-1], "fwd", "wrong result"),
        (_ForgetsGradient.apply, "fwdbwd", "wrong result"),
        (crash, "fwd", "RuntimeError: no such kernel"),
    ],
    ids=["scaled", "nan", "shape", "gradient", "crash"],
)
def test_a_wrong_implementation_gets_no_figure(alter, pass_, complaint):
    entrants = [registry.by_name()["dense"], altered("masked", alter), registry.by_name()["loop"]]
    found = outcomes_of(Case(TINY, 9, "fp32", pass_), entrants)
    assert found["altered"].error.startswith(complaint)
    assert found["altered"].ratio_to_dense is None
    assert found["altered"].median_ms is None
    assert found["loop"].ratio_to_dense > 0  # the others go on


def test_ratio_is_that_of_the_same_round():
    """A machine that slows down for both does not change it."""
    outcome = measure._outcome([1.0, 2.0, 30.0, 4.0], [2.0, 4.0, 60.0, 8.0], 1e-7)
    assert outcome.ratio_to_dense == 0.5
    assert outcome.ratio_of_minima == 0.5
    assert (outcome.median_ms, outcome.dense_ms, outcome.min_ms) == (3000, 6000, 1000)
    assert outcome.rounds == 4


def test_slow_ones_run_less_often_and_hopeless_ones_not_again():
    calls = []

    def clock(runner, x_ND, experts_NK, dy_ND):
        with torch.no_grad():
            y_ND = runner.call(x_ND, experts_NK)
        name = owners[id(runner.leaves), runner.call]
        calls.append(name)
        return Pass({"dense": 0.001, "loop": 0.0009, "masked": 0.01, "hopeless": 20.0}[name], y_ND)

    owners = {}

    def named(name, source):
        def prepare(layer):
            runner = registry.by_name()[source].prepare(layer)
            owners[id(runner.leaves), runner.call] = name
            return runner

        return registry.by_name()[source]._replace(name=name, prepare=prepare)

    entrants = [named("dense", "dense"), named("loop", "loop"), named("masked", "masked"), named("hopeless", "masked")]
    patience = measure.Patience()
    case = Case(TINY, 4, "fp32", "fwd")
    found = outcomes_of(case, entrants, clock=clock, budget=0.07, patience=patience)
    assert found["loop"].rounds == found["dense"].rounds >= 12
    assert found["masked"].rounds == -(-found["loop"].rounds // 4)
    assert found["hopeless"].rounds == 1
    assert found["hopeless"].iqr_ms is None
    assert found["hopeless"].ratio_to_dense == 20_000
    assert calls.count("hopeless") == 1

    later = outcomes_of(case._replace(tokens=8), entrants, clock=clock, patience=patience)
    assert later["hopeless"].skipped == "took 20 s for fewer tokens"
    assert calls.count("hopeless") == 1


def test_too_much_memory_is_skipped():
    case = Case(TINY, 9, "fp32", "fwdbwd")
    found = outcomes_of(case, [registry.by_name()[n] for n in ("dense", "tf.batched_mm")], memory_limit=1e-5)
    assert "limit 1e-05" in found["tf.batched_mm"].skipped
    blocks = 9 * 2 * 3 * 16 * 32
    assert registry.by_name()["tf.batched_mm"].scratch_bytes(case) == 2 * 4 * blocks


def test_rows_have_the_form_that_was_promised(tmp_path):
    file = tmp_path / "grid.json"
    flags = [*FLAGS, "--tokens", "1,8", "--dtype", "bf16", "--json", str(file), "--impl", "emoe,loop,tf.batched_mm"]
    assert run.main([*flags, "--memory-limit", "1e-7"]) == 0
    rows = json.loads(file.read_text())
    assert len(rows) == 2 * 2 * 4  # tokens, passes, implementations with dense
    for row in rows:
        assert set(row) == FIELDS
        assert row["shape"] == [32, 128, 8, 2]
        assert row["ideal"] == 0.25
        assert row["dtype"] == "bf16"
        assert row["pass"] in ("fwd", "fwdbwd")
        assert (row["ratio_to_dense"] is None) == (row["impl"] == "tf.batched_mm") == (row["skipped"] is not None)
        assert row["union"] == 2 if row["tokens"] == 1 else 2 < row["union"] <= 8
        assert results.Row.from_json(row).as_json() == row
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "grid.md").read_text()
    assert "## (32, 128), 8 experts of 16, bf16, fwdbwd" in page
    assert "tf.batched_mm, 4 cases, skipped: would take" in page
    assert not list(tmp_path.glob(".*"))


def test_resume_measures_only_what_is_missing(tmp_path, capsys):
    file = tmp_path / "grid.json"
    flags = [*FLAGS, "--tokens", "1", "--pass", "fwd", "--json", str(file)]
    assert run.main([*flags, "--impl", "loop", "--dtype", "fp32"]) == 0
    before = json.loads(file.read_text())
    capsys.readouterr()
    assert run.main([*flags, "--impl", "loop,masked", "--resume"]) == 0
    after = json.loads(file.read_text())
    assert after[: len(before)] == before
    assert [(r["dtype"], r["impl"]) for r in after[len(before) :]] == [
        ("fp32", "masked"),
        ("bf16", "dense"),
        ("bf16", "masked"),
        ("bf16", "loop"),
    ]
    capsys.readouterr()
    assert run.main([*flags, "--impl", "loop", "--resume"]) == 0
    assert "dense" not in capsys.readouterr().out  # nothing left to measure
    assert json.loads(file.read_text()) == after


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--impl", "lop"], "'lop' is unknown (did you mean 'loop'?)"),
        (["--shape", "2048"], "'2048' is not understood; for example 2048x5632"),
        (["--shape", "32x100", "--experts", "8"], "F=100 is not divisible by --experts 8"),
        (["--fraction", "1/3"], "1/3 of 64 experts is not a number from 1 to 64"),
        (["--fraction", "1/0"], "'1/0' is not understood"),
        (["--fraction", "2"], "2 of 64 experts is not a number from 1 to 64"),
        (["--tokens", "0"], "'0' is not understood"),
        (["--dtype", "fp8"], "'fp8' is unknown"),
        (["--pass", "bwd"], "'bwd' is unknown"),
        (["--threads", "0"], "'0' is not a number above 0"),
        (["--budget", "nan"], "'nan' is not a number above 0"),
        (["--resume"], "--resume needs --json FILE"),
        (["--json", "no/such/folder/x.json"], "does not exist"),
        (["--json", "x.png"], "overwritten"),
        (["--routing", "even"], "'even' is neither 'random' nor 'trace FILE'"),
        (["--routing", "trace", "no.safetensors"], "no.safetensors does not exist"),
        (["--nonsense"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, complaint, capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(flags)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert complaint in lines[0]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"shape": [1, 2, 3]}]'])
def test_resume_refuses_a_file_that_is_not_its_own(content, tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(SystemExit):
        run.main([*FLAGS, "--json", str(file), "--resume"])
    assert "is not a file of results" in capsys.readouterr().err


def test_resume_refuses_another_setting(tmp_path, capsys):
    file = tmp_path / "grid.json"
    flags = [*FLAGS, "--tokens", "1", "--pass", "fwd", "--dtype", "fp32", "--impl", "loop", "--json", str(file)]
    assert run.main(flags) == 0
    with pytest.raises(SystemExit):
        run.main([*flags, "--resume", "--seed", "1"])
    assert "were measured with seed 0, not 1" in capsys.readouterr().err


@pytest.fixture
def trace_file(tmp_path):
    """16 tokens of 4 layers that use experts 0 and 1 alone, at K = 2."""
    facts = {"model": "m", "width": 32, "hidden": 128, "experts": 8, "top_k": [2], "layers": [0, 1, 2, 3]}
    tensors = {f"k2.layer{i}": torch.tensor([[0, 1]] * 16, dtype=torch.int16) for i in range(4)}
    path = tmp_path / "trace.safetensors"
    save_file(tensors, path, metadata={"router_traces": json.dumps(facts)})
    return path


def test_traces_give_shape_and_routing(trace_file, tmp_path, capsys):
    file = tmp_path / "grid.json"
    flags = ["--routing", "trace", str(trace_file), "--impl", "loop", *SHORT]
    assert run.main([*flags, "--tokens", "1,8", "--pass", "fwd", "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert {tuple(row["shape"]) for row in rows} == {(32, 128, 8, 2)}
    assert {row["union"] for row in rows} == {2.0}
    assert {row["routing"] for row in rows} == {"trace.safetensors"}
    for more, complaint in (
        (["--tokens", "17"], "holds 16"),
        (["--fraction", "1/2"], "the trace holds 1/4"),
        (["--shape", "32x128"], "come from the trace"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            run.main([*flags, *more])
        assert complaint in capsys.readouterr().err


def test_a_file_that_is_no_trace(tmp_path, capsys):
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(SystemExit):
        run.main(["--routing", "trace", str(path)])
    assert "is not a file of router traces" in capsys.readouterr().err


def test_random_routing_is_balanced_and_distinct():
    experts_NK = cases.random_routing(2048, TINY, torch.Generator().manual_seed(0))
    assert (experts_NK.sort(1).values.diff(dim=1) > 0).all()
    counts = experts_NK.flatten().bincount(minlength=8)
    assert (counts - 512).abs().max() < 5 * (512 * 0.75) ** 0.5


def row(impl, ratio, **changes):
    shape = cases.make_shape(576, 1536, 64, changes.pop("fraction", Fraction(1, 4)))
    outcome = changes.pop("outcome", None)
    if outcome is None:
        outcome = Outcome(ratio, ratio, ratio * 10, ratio * 9, ratio * 0.2, 10.0, 9, 1e-7)
    setting = results.Setting(2, 0, "random", "shared", "2.13", "a machine", "abc-dirty")
    return results.Row(Case(shape, 8, "fp32", "fwd"), impl, outcome, 57.5, changes.get("peak"), setting)


def test_table_says_who_won():
    rows = [
        row("dense", 1.0, peak=measure.Peak(40.0, 39.0)),
        row("emoe", 0.31),
        row("loop", 0.47),
        row("F.grouped_mm", 0, outcome=Outcome(error="RuntimeError: strides")),
        row("tf.eager", 0, outcome=Outcome(error="wrong result, tolerance 1e-05: y 0.1")),
        row("tf.batched_mm", 0, outcome=Outcome(skipped="would take 9 GiB")),
        row("dense", 1.0, fraction=Fraction(1, 2)),
        row("emoe", 0.8, fraction=Fraction(1, 2)),
        row("loop", 0.7, fraction=Fraction(1, 2)),
    ]
    page = results.markdown(rows, "python run.py")
    assert "| 8 | 0.25 | 57.5 | 10 | **0.31** | 0.47 | crash | wrong | skip | yes | ours |" in page
    assert "| 8 | 0.5 | 57.5 | 10 | 0.8 | **0.7** |  |  |  | no | no |" in page
    assert (
        "within 1.3 times the ideal in 1 of 2 cases, faster than dense in 2, and the fastest of all in 1 of 2" in page
    )
    assert "K 32, N 8, fp32 fwd: 0.8, loop 0.7" in page
    assert "- F.grouped_mm, 1 case, error: RuntimeError: strides" in page
    assert "40.0 / 39.0" in page
    assert "commit abc-dirty" in page


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_scratch_and_not_the_output():
    def call():
        scratch = b"x" * (48 << 20)  # not torch's: a kernel's own memory
        return torch.full((8 << 20,), scratch[0], dtype=torch.uint8)

    memory.peak_mib(call)
    assert memory.peak_mib(call) == pytest.approx(48, abs=2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_runs_in_processes_of_its_own():
    found = measure.measure_memory(TINY, 512, "fp32", ["dense", "loop"], threads=1, seed=0)
    assert set(found) == {"dense", "loop"}
    assert all(peak.again < 8 for peak in found.values())


def test_traces_of_a_converted_model_can_be_read(tiny_llama, settings, text_file, tmp_path, monkeypatch, capsys):
    import emoe

    fixed = settings | {"routing": "top-k", "allocation": "uniform", "held_out_tokens": 0}
    emoe.convert(str(tiny_llama), output=tmp_path / "fixed", **fixed)
    file = tmp_path / "traces.safetensors"
    flags = ["--text", str(text_file), "--tokens", "128", "--sequence-length", "64", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["router_traces.py", str(tmp_path / "fixed"), *flags])
    assert script("router_traces").main() == 0
    assert "K 2 of 8, union of experts (random): N 1: 2.0 (2.0)" in capsys.readouterr().out
    traces = cases.read_traces(file)
    assert sorted(traces.layers) == [1, 2, 4]
    for chosen, layers in traces.layers.items():
        assert len(layers) == 4  # the tiny model's
        for experts_TK in layers:
            assert experts_TK.shape == (128, chosen)
            assert all(len(set(row)) == chosen for row in experts_TK.tolist())
        assert [len(w) for w in traces.windows(128, chosen)] == [128] * cases.ROUTINGS


@pytest.mark.parametrize(
    ("folder", "complaint"), [("nowhere", "not the folder"), ("dense", "is dense"), ("varying", "--routing top-k")]
)
def test_traces_refuse_what_is_not_converted(
    folder, complaint, tiny_llama, converted_llama, tmp_path, monkeypatch, capsys
):
    folder = {"dense": tiny_llama, "varying": converted_llama}.get(folder, tmp_path / folder)
    monkeypatch.setattr(sys, "argv", ["router_traces.py", str(folder), "--output", str(tmp_path / "x")])
    assert script("router_traces").main() == 2
    assert complaint in capsys.readouterr().err


def test_whole_model_is_measured(converted_llama, tiny_llama, tmp_path, monkeypatch, capsys):
    file = tmp_path / "model.json"
    flags = ["--dtype", "fp32", "--prefill", "16", "--new-tokens", "2", "--rounds", "2", "--threads", "1"]
    flags += ["--top-k", "2", "--top-k", "4", "--no-memory", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["measure_model.py", str(converted_llama), "--dense", str(tiny_llama), *flags])
    assert script("measure_model").main() == 0
    timings = json.loads(file.read_text())["timings"]
    assert [(t["task"], t["model"]) for t in timings] == [
        (task, model) for task in ("generate 2", "prefill 16") for model in ("dense", "K 2", "K 4")
    ]
    for t in timings:
        assert 0 < t["ffn_share"] < 1
        dense = next(d for d in timings if (d["task"], d["model"]) == (t["task"], "dense"))
        assert t["bound"] == pytest.approx(dense["ffn_share"] * t["active"] + 1 - dense["ffn_share"], abs=1e-3)
    assert (tmp_path / "model.md").read_text().count("| fp32 | generate 2 |") == 3

    monkeypatch.setattr(sys, "argv", ["measure_model.py", str(tiny_llama), "--dense", str(tiny_llama), *flags])
    assert script("measure_model").main() == 2
    assert "is dense; `emoe convert` makes a converted one" in capsys.readouterr().err


def test_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "kernels/benchmarks/run.py", "--impl", "fast"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("run.py: argument --impl: 'fast' is unknown")


# Stick-breaking attention


def test_stick_breaking_rows_and_table(tmp_path, monkeypatch):
    """Tiny, all passes. One contestant is wrong: it gets an error and no figure, and the exit status says so."""
    monkeypatch.setattr(stickbreaking, "SHAPES", {"tiny": (2, 1, 16)})
    monkeypatch.setattr(stickbreaking, "DECODING", 24)
    true = stickbreaking.triangular
    monkeypatch.setattr(stickbreaking, "triangular", lambda q, k, v, sums: true(q, k, v, sums.t()))
    path = tmp_path / "rows.json"
    flags = ["--json", str(path), "--length", "24", "--dtype", "fp32", "--budget", "0.01", "--threads", "1"]
    assert stickbreaking.main(flags) == 1
    rows = json.loads(path.read_text())
    assert {(row["pass_"], row["sticks"]) for row in rows} == {
        (pass_, sticks) for pass_ in ("fwd", "fwdbwd", "decode") for sticks in ("long", "short")
    }
    for row in rows:
        if row["impl"].startswith("triangular"):
            assert "wrong result" in row["error"] and "median_ms" not in row
        else:
            assert row["rounds"] >= 1 and row["over sdpa"] > 0 and row.get("check_error", 0) <= 1e-5
            assert "over triangular" not in row
    assert "| fwdbwd | 24 | long |" in path.with_suffix(".md").read_text()
