"""`emoe sweep`: which cells run, what is chosen and by what, what a failure does."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from support.trainer import FakeTrainer

from emoe.cli.main import main
from emoe.errors import UserError
from emoe.evaluation.runs import read_runs
from emoe.evaluation.sweep import estimate, sweep
from emoe.evaluation.sweep_config import SweepConfig, read_sweep, seed_list, variants
from emoe.evaluation.sweep_plan import Cell, settings_of
from emoe.finetuning import arms as known_arms
from emoe.report.sweep import write_summary
from emoe.runtime import sole_writer

QUIET = lambda stage, done, total: None  # noqa: E731
BASE = {"model": "bert-base", "task": "sentiment"}
PLAIN = {
    "base": BASE,
    "arms": {"vanilla": {"method": "vanilla"}, "emoe": {"method": "emoe"}},
    "seeds": "0:3",
}
SELECT = PLAIN | {"select": {"learning_rate": [2e-5, 5e-5]}, "select_seeds": "0,1"}


def run(settings, folder, trainer=None, said=None):
    said = [] if said is None else said
    return sweep(SweepConfig(**settings), folder, QUIET, said.append, trainer or FakeTrainer())


def test_seeds_are_outermost(tmp_path):
    """A sweep stopped half-way holds all arms at fewer seeds."""
    trainer = FakeTrainer()
    run(PLAIN, tmp_path, trainer)
    assert trainer.asked == [(arm, seed) for seed in range(3) for arm in ("vanilla", "emoe")]


def test_it_goes_on_where_it_stopped(tmp_path):
    run({**PLAIN, "seeds": "0:2"}, tmp_path)
    trainer = FakeTrainer()
    result = run(PLAIN, tmp_path, trainer)
    assert trainer.asked == [("vanilla", 2), ("emoe", 2)]
    assert result.ran == 2
    assert run(PLAIN, tmp_path).ran == 0


def test_several_at_one_sweep_share_its_cells(tmp_path, monkeypatch):
    monkeypatch.setattr("emoe.evaluation.sweep.PAUSE", 0.01)
    monkeypatch.setattr("emoe.evaluation.sweep._write", lambda *a: None)  # its temporary file has a process's name
    trainers = [SlowTrainer() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:  # a lock on a folder knows no threads: each opens it anew
        results = list(pool.map(lambda trainer: run({**PLAIN, "seeds": "0:6"}, tmp_path, trainer), trainers))
    asked = [cell for trainer in trainers for cell in trainer.asked]
    assert sorted(asked) == [(arm, seed) for arm in ("emoe", "vanilla") for seed in range(6)]
    assert all(trainer.asked for trainer in trainers)
    assert all(result.chosen == results[0].chosen and not result.failed for result in results)


class SlowTrainer(FakeTrainer):
    """Holds its seed's folder for a while, as `emoe finetune` does."""

    def __call__(self, config, progress, say) -> None:
        seed = config.seed_list()[0]
        with sole_writer(Path(config.output) / f".base-{seed}"):
            if not (Path(config.output) / f"seed-{seed}" / "run.json").exists():
                time.sleep(0.05)
                super().__call__(config, progress, say)


class Killed(FakeTrainer):
    """The process ends in its nth cell."""

    def __init__(self, cell: int) -> None:
        super().__init__()
        self.last = cell

    def __call__(self, config, progress, say) -> None:
        if len(self.asked) == self.last:
            raise KeyboardInterrupt
        super().__call__(config, progress, say)


@pytest.mark.parametrize(("settings", "cells", "arms"), [(PLAIN, 3, 2), (PLAIN, 1, 1), (SELECT, 9, 2)])
def test_a_killed_sweep_is_compared_as_far_as_it_got(settings, cells, arms, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path, Killed(cells))
    assert [found.name for found in read_runs([str(tmp_path)])] == ["vanilla", "emoe"][:arms]


def test_a_sweep_killed_before_it_chose_says_so(tmp_path):
    """Of two finished candidates of four, the better one is no choice yet."""
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(SELECT, tmp_path, Killed(2))
        with pytest.raises(UserError, match="has no finished run of an arm whose settings are chosen"):
            read_runs([str(tmp_path)])


def test_what_cells_say_is_said_once(tmp_path):
    class Talks(FakeTrainer):
        def __call__(self, config, progress, say):
            say("domain imdb is left out: no such file")
            super().__call__(config, progress, say)

    said = []
    run(PLAIN, tmp_path, Talks(), said)
    assert said == ["domain imdb is left out: no such file"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"arms": {"a": {"method": "vanila"}}}, "sweep: arm 'a': method: unknown method 'vanila'"),
        ({"arms": {"a": {"lora_r": "x"}}}, "sweep: arm 'a': lora_r: must be a whole number"),
        ({"arms": {"vanilla": {}}}, "arm 'vanilla': it names no method and would be 'emoe'; write 'vanilla: {method"),
        ({"base": {"model": "bert-base", "task": "sentimnt"}}, "arm 'vanilla': task: unknown task 'sentimnt'"),
        ({"base": BASE | {"domains": "amazon, foo"}}, "arm 'vanilla': domains: task 'sentiment' has no domain 'foo'"),
        ({"base": {"task": "sentiment"}}, "arm 'vanilla': model: missing"),
        ({"base": BASE | {"model": "nosuchmodel"}}, "arm 'vanilla': model: unknown model 'nosuchmodel'"),
        ({"base": BASE | {"model": "./nowhere"}}, "arm 'vanilla': model: ./nowhere does not exist"),
        ({"base": BASE | {"model": "configs"}}, "arm 'vanilla': model: the folder configs has no config.json"),
        (
            {"analysis": [{"kind": "gains", "x": "experts"}]},
            "the sweep does not cross 'experts'; it crosses only: arm; add 'cross: {experts: […]}'",
        ),
        ({"arms": {"a": {"method": "vanilla", "cross": [1]}}}, "'cross' of arm 'a' must name settings"),
    ],
)
def test_what_every_cell_would_stumble_over_is_found_first(changes, complaint, tmp_path):
    trainer, wrong = FakeTrainer(), PLAIN | changes
    with pytest.raises(UserError, match=re.escape(complaint)):
        estimate(SweepConfig(**wrong), tmp_path)
    with pytest.raises(UserError, match=re.escape(complaint)):
        run(wrong, tmp_path, trainer)
    assert not trainer.asked


@pytest.mark.parametrize("model", ["bert-base", "some/model-that-the-hub-may-have", "{folder}"])
def test_models_are_named_without_a_download(model, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    base = BASE | {"model": model.format(folder=tmp_path)}
    assert estimate(SweepConfig(**{**PLAIN, "base": base}), tmp_path / "out").left


def test_an_arm_without_settings_has_the_base_alone(tmp_path):
    path = tmp_path / "sweep.yaml"
    path.write_text("base: {model: bert-base, task: sentiment}\narms:\n  emoe:\nselect:\nseeds: 0:2\n")
    assert variants(read_sweep(path))[0].candidates[0].settings == BASE


def test_validation_alone_chooses(tmp_path):
    """The made-up test scores favour the rate that validation does not."""
    trainer = FakeTrainer()
    result = run(SELECT, tmp_path, trainer)
    assert result.chosen == {"vanilla": "vanilla__learning_rate=5e-05", "emoe": "emoe__learning_rate=2e-05"}
    assert result.selection["emoe"] == pytest.approx(
        {"emoe__learning_rate=2e-05": 90.05, "emoe__learning_rate=5e-05": 80.05}
    )
    assert len(trainer.asked) == 2 * 2 * 2 + 2  # both rates on two seeds, the chosen ones on the third
    assert ("emoe__learning_rate=5e-05", 2) not in trainer.asked
    assert json.loads((tmp_path / "sweep.json").read_text())["chosen"] == result.chosen


@pytest.mark.parametrize(("seed", "message"), [(1, "the loss is nan in step 3"), (2, "RuntimeError: out of memory")])
def test_a_failed_cell_is_reported_and_the_rest_goes_on(tmp_path, seed, message):
    said, trainer = [], FakeTrainer(fail=("emoe", seed))
    result = run(PLAIN, tmp_path, trainer, said)
    assert len(trainer.asked) == 6
    assert result.failed == {f"emoe, seed {seed}": message}
    assert len(said) == 1
    assert message in (tmp_path / "failed" / f"emoe-seed-{seed}.txt").read_text()
    assert run(PLAIN, tmp_path).failed == {}  # the next call tries it again


def test_a_candidate_that_failed_is_not_chosen(tmp_path):
    class Diverges(FakeTrainer):
        def __call__(self, config, progress, say):
            if config.learning_rate == 2e-5 and config.method == "emoe":
                raise UserError("the loss is nan")
            super().__call__(config, progress, say)

    assert run(SELECT, tmp_path, Diverges()).chosen["emoe"] == "emoe__learning_rate=5e-05"


def test_an_arm_that_always_fails_is_not_compared(tmp_path):
    class Broken(FakeTrainer):
        def __call__(self, config, progress, say):
            if config.method == "emoe":
                raise UserError("no")
            super().__call__(config, progress, say)

    result = run(SELECT, tmp_path, Broken())
    assert "emoe" not in result.chosen
    assert len(result.failed) == 4


def test_other_settings_are_not_mixed(tmp_path):
    run(PLAIN, tmp_path)
    changed = {**PLAIN, "base": {**PLAIN["base"], "max_length": 64}}
    with pytest.raises(UserError, match=r"was run with max_length 128 \(now 64\); choose another --output"):
        run(changed, tmp_path)


def test_crossing(tmp_path):
    """Settings crossed with one arm leave the baseline alone; those crossed with all have a baseline each."""
    config = SweepConfig(
        base=PLAIN["base"],
        arms={"vanilla": {"method": "vanilla"}, "emoe": {"method": "emoe", "cross": {"experts": [16, 64]}}},
        cross={"train_limit": [100, 200]},
    )
    rows = variants(config)
    assert [row.name for row in rows] == [
        *(f"vanilla, train_limit {n}" for n in (100, 200)),
        *(f"emoe, train_limit {n}, experts {e}" for n in (100, 200) for e in (16, 64)),
    ]
    settings = rows[3].candidates[0].settings
    assert (settings["train_limit"], settings["experts"], settings["method"]) == (100, 64, "emoe")


def test_arms_are_compared_at_the_same_shared_values(tmp_path):
    run({**PLAIN, "cross": {"train_limit": [100, 200]}}, tmp_path)
    found = write_summary(tmp_path, 200, QUIET)
    names = [[row.name for row in comparison.rows] for comparison in found]
    assert names == [[f"{arm}, train_limit {n}" for arm in ("vanilla", "emoe")] for n in (100, 200)]
    assert (tmp_path / "comparison-train_limit-200.md").is_file()
    assert "(comparison-train_limit-100.md)" in (tmp_path / "summary.md").read_text()


def test_estimate(tmp_path):
    config = SweepConfig(**SELECT, seconds_per_run=30)
    assert len(estimate(config, tmp_path).left) == 10
    assert estimate(config, tmp_path).seconds == 300
    run({**SELECT, "seeds": "0:2"}, tmp_path)
    found = estimate(config, tmp_path)
    assert len(found.done) == 8
    assert found.left == ["vanilla__learning_rate=5e-05, seed 2", "emoe__learning_rate=2e-05, seed 2"]
    assert found.seconds == pytest.approx(2 * 60.5)  # each arm's own mean
    assert estimate(SweepConfig(**SELECT), tmp_path / "new").seconds is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"arm": {}}, "unknown key 'arm' (did you mean 'arms'?)"),
        ({"arms": {}}, "has no arm"),
        ({"base": {"modle": "x"}}, "unknown setting 'modle' (did you mean 'model'?)"),
        ({"base": {"output": "x"}}, "'output' is not for arms; the sweep sets it"),
        ({"select": {"learning_rate": []}}, "'learning_rate' must be a list of values"),
        ({"cross": {"experts": 4}}, "cross.experts: Input should be a valid list"),
        ({"base": {"task": "sentiment", "learning_rate": "fast"}}, "arm 'emoe': learning_rate: must be a number"),
        ({"seeds": "a"}, "sweep: seeds: 'a' is no list"),
        ({"select_seeds": "7", "select": {"learning_rate": [1e-5]}}, "select_seeds 7 must be among seeds 0:3"),
        ({"arms": {"a b": {}, "a:b": {}}}, "would both be called 'a-b'"),
        ({"cross": {"method": ["vanilla", "emoe"]}}, "'method' tells arms apart"),
        (
            {"arms": {"emoe": {"learning_rate": 1e-4}}, "select": {"learning_rate": [1e-5]}},
            "'learning_rate' of arm 'emoe' is given twice",
        ),
        ({"analysis": [{"kind": "gain"}]}, "analysis.0.kind: "),
    ],
)
def test_bad_files(change, complaint, tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**PLAIN, **change}))
    assert main(["sweep", str(path), "--output", str(tmp_path / "out"), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["- 1", "{", ""])
def test_files_that_are_no_sweep(text, tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    assert main(["sweep", str(path)]) == 2
    assert "emoe: sweep: " in capsys.readouterr().err


def test_seeds_are_read_as_they_are_written(tmp_path):
    """YAML 1.1 would read 5:10 as minutes and seconds: one seed, number 310."""
    path = tmp_path / "sweep.yaml"
    path.write_text("arms: {vanilla: {method: vanilla}}\nseeds: 5:10\nselect_seeds: 5\nseconds_per_run: 1.5\n")
    config = read_sweep(path)
    assert (config.seeds, config.select_seeds, config.seconds_per_run) == ("5:10", "5", 1.5)


def test_the_command(tmp_path, monkeypatch, capsys):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SELECT | {"analysis": [{"kind": "gains"}]}))
    monkeypatch.setattr("emoe.evaluation.sweep._finetune", lambda: FakeTrainer())
    arguments = ["sweep", str(path), "--output", str(tmp_path / "out"), "--resamples", "200"]
    assert main([*arguments, "--dry-run"]) == 0
    assert "10 to run, 0 done" in capsys.readouterr().out
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "vanilla__learning_rate=5e-05 was chosen on ID validation" in shown
    assert "3 seeds in pairs" in shown
    written = {p.name for p in (tmp_path / "out").iterdir() if p.is_file()}
    assert written == {
        *("sweep.json", "summary.md", "comparison.md", "comparison.json", "comparison.html"),
        *("gains-by-arm.md", "gains-by-arm.png"),
    }
    again = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert main(["compare", str(tmp_path / "out"), "--resamples", "200", "--format", "json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out) == again  # rebuilt from the raw predictions by one command


def test_the_command_says_that_something_failed(tmp_path, monkeypatch, capsys):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(PLAIN))
    monkeypatch.setattr("emoe.evaluation.sweep._finetune", lambda: FakeTrainer(fail=("emoe", 1)))
    assert main(["sweep", str(path), "--output", str(tmp_path / "out"), "--resamples", "200"]) == 1
    printed = capsys.readouterr()
    assert "failed: emoe, seed 1: the loss is nan in step 3" in printed.err
    assert "2 seeds in pairs (0, 2)" in printed.out
    assert "emoe, seed 1: the loss is nan in step 3" in (tmp_path / "out" / "summary.md").read_text()
    assert main(["sweep", str(path), "--output", str(tmp_path / "quiet"), "--resamples", "200", "--quiet"]) == 1
    assert capsys.readouterr() == ("", "")


FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(path for kind in ("sweeps", "analysis") for path in (FOLDER / kind).glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_our_sweeps_are_sound(path):
    """Every cell's settings are accepted; the baseline is vanilla; 5 seeds at the least."""
    config = read_sweep(path)
    rows = variants(config)
    assert rows[0].candidates[0].settings["method"] == "vanilla"
    assert len(seed_list(config.seeds, "seeds")) >= 5
    for cell in estimate(config, path.parent / "nowhere").left:
        assert cell
    for row in rows:
        method = row.candidates[0].settings["method"]
        assert method in known_arms.ARMS
    for analysis in config.analysis:
        crossed = {"arm", *(key for row in rows for key in row.point)}
        assert {analysis.x, analysis.lines or "arm"} <= crossed


def test_sweeps_are_there():
    assert {"sentiment_minilm", "sentiment_smollm2", "spam_minilm"} <= {path.stem for path in CONFIGS}


def test_a_cell_has_settings_of_its_own(tmp_path):
    row = variants(SweepConfig(**SELECT))[1]
    config = settings_of(Cell(row.candidates[1], 2), tmp_path)
    assert (config.method, config.learning_rate, config.seeds, config.resume) == ("emoe", 5e-5, "2", True)
    assert config.output == str(tmp_path / "emoe__learning_rate=5e-05")
