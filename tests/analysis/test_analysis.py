"""The analyses: each point against its own baseline; histories of routers as the logs have them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.runs import write_run
from support.trainer import FakeTrainer

from emoe.analysis.gains import gains
from emoe.analysis.routing import routing_history
from emoe.errors import UserError
from emoe.evaluation.compare import compare
from emoe.evaluation.runs import read_run
from emoe.evaluation.sweep import sweep
from emoe.evaluation.sweep_config import SweepConfig
from emoe.report.analysis import gains_figure, gains_markdown, routing_figure, routing_markdown, write_analyses

QUIET = lambda stage, done, total: None  # noqa: E731


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A sweep over data and experts, and its folder."""
    folder = tmp_path_factory.mktemp("sweep")
    config = SweepConfig(
        base={"model": "bert-base", "task": "sentiment"},
        arms={"vanilla": {"method": "vanilla"}, "emoe": {"method": "emoe", "cross": {"experts": [16, 64]}}},
        cross={"train_limit": [100, 200]},
        seeds="0:6",
        analysis=[{"kind": "gains", "x": "experts", "lines": "train_limit"}, {"kind": "routing"}],
    )
    sweep(config, folder, QUIET, train=FakeTrainer())
    return config, folder


def test_each_point_is_compared_with_its_own_baseline(finished):
    config, folder = finished
    found = gains(folder, config, "experts", "train_limit", 200, QUIET)
    assert [(p.point["train_limit"], p.point["experts"]) for p in found.points] == [
        *((100, 16), (100, 64), (200, 16), (200, 64))
    ]
    runs = [read_run(folder / name) for name in ("vanilla__train_limit=200", "emoe__train_limit=200__experts=64")]
    assert found.points[3].differences == compare(runs, resamples=200).rows[1].differences
    assert found.points[3].seeds == 6
    text = gains_markdown(found)
    assert "| 64 | 200 | 6 | +" in text
    assert len(gains_figure(found).axes) == len(found.points[0].differences)


def test_what_is_not_crossed_cannot_be_asked(finished):
    config, folder = finished
    with pytest.raises(UserError, match=r"does not cross 'expert' \(did you mean 'experts'\?\)"):
        gains(folder, config, "expert", None, 200, QUIET)


def test_what_did_not_finish_is_named(finished, tmp_path):
    config, _ = finished

    class Broken(FakeTrainer):
        def __call__(self, settings, progress, say):
            if settings.experts == 16:
                raise UserError("no")
            super().__call__(settings, progress, say)

    sweep(config, tmp_path, QUIET, lambda line: None, Broken())
    (tmp_path / "vanilla__train_limit=100").mkdir(exist_ok=True)
    found = gains(tmp_path, config, "experts", "train_limit", 200, QUIET)
    assert [p.point["experts"] for p in found.points] == [64, 64]
    assert found.missing == ["emoe, train_limit 100, experts 16", "emoe, train_limit 200, experts 16"]


def log_lines(steps: int = 4, experts: int = 8) -> list[dict]:
    """Two layers; the first's load moves from even to one expert of two."""
    lines = []
    for number in range(steps):
        share = number / (steps - 1)
        frequencies = np.full(experts, 0.25) * (1 - share)
        frequencies[0] += share
        frequencies[1] += share
        layer = {"entropy": 1 - share / 2, "max_share": 0.1, "overlap": None if number == 0 else 0.5}
        router = {"2": layer | {"frequencies": frequencies.tolist()}, "4": layer | {"frequencies": [0.25] * experts}}
        lines.append({"step": 10 * (number + 1), "loss": 0.5, "router": router})
        lines.append({"step": 10 * (number + 1), "validation": 0.8})
    return lines


def test_routing_history(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in log_lines()))
    found = routing_history(path)
    assert list(found) == ["2", "4"]
    assert found["2"].steps_T.tolist() == [10, 20, 30, 40]
    assert found["2"].frequencies_TE.shape == (4, 8)
    assert np.isnan(found["2"].overlap_T[0])
    assert found["2"].drift == pytest.approx(0.75)  # from 2 of 8 experts' share to all
    assert found["4"].drift == 0
    with pytest.raises(UserError, match="cannot read"):
        routing_history(tmp_path / "none.jsonl")


def test_routing_table_and_plot(tmp_path):
    history = {}
    for seed in range(2):
        path = tmp_path / f"{seed}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in log_lines()))
        history[seed] = routing_history(path)
    text = routing_markdown({"emoe": history})
    assert "| emoe | 2 | 2 | 1.000 | 0.500 | 0.100 | 0.100 | 0.500 | 0.750 |" in text
    assert len(routing_figure("emoe", history).axes) == 6  # two panels a layer and a scale each


def test_analyses_are_written(finished):
    config, folder = finished
    for name in json.loads((folder / "sweep.json").read_text())["chosen"].values():
        for seed in range(6):
            routed = "" if name.startswith("vanilla") else "".join(json.dumps(line) + "\n" for line in log_lines())
            (folder / name / f"seed-{seed}" / "log.jsonl").write_text(routed)
    written = write_analyses(config, folder, 200, QUIET)
    gains = "gains-by-experts-and-train_limit"
    assert [path.name for path in written] == [f"{gains}.md", "routing.md"]
    assert "vanilla" not in written[1].read_text()
    assert {p.name for p in folder.glob("*.png")} == {
        "gains-by-experts-and-train_limit.png",
        *(f"routing-{n}.png" for n in range(4)),
    }


def test_readings_stand_in_one_table(tmp_path):
    arms = {name: {"method": name} for name in ("vanilla", "emoe")}
    base = {"model": "bert-base", "task": "sentiment"}
    config = SweepConfig(base=base, arms=arms, analysis=[{"kind": "readings"}])
    sweep(config, tmp_path, QUIET, lambda line: None, FakeTrainer(readings=("as-trained", "dense")))
    (written,) = write_analyses(config, tmp_path, 200, QUIET)
    text = written.read_text()
    assert written.name == "readings.md"
    assert "| emoe read as dense | movies |" in text
    assert "Cost" not in text and "Every seed" not in text


def test_a_run_without_a_log_is_named(finished, tmp_path):
    write_run(tmp_path / "run", 0)
    with pytest.raises(UserError, match=r"cannot read .*seed-0/log.jsonl"):
        from emoe.analysis.routing import histories

        histories(read_run(tmp_path / "run"))
