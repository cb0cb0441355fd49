"""`emoe compare` on made-up runs: what it finds, which runs and readings it takes, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from sklearn.metrics import f1_score
from support.runs import DOMAINS, RESAMPLES, answers, balanced_accuracy, compared, truth, write_predictions, write_run

from emoe.cli.main import main
from emoe.errors import UserError
from emoe.evaluation.compare import OOD_MEAN, compare
from emoe.evaluation.runs import read_runs


def test_scores_are_those_of_the_raw_predictions(found):
    for domain in DOMAINS:
        labels, _ = truth(domain, 200)
        said = [answers(domain, 200, seed, 1, 0.5, 0.05) for seed in range(8)]
        expected = [100 * balanced_accuracy(labels, of_seed) for of_seed in said]
        scores = found.rows[1].scores[domain]
        assert scores.by_seed == pytest.approx(expected, abs=1e-4)
        assert scores.mean == pytest.approx(np.mean(expected), abs=1e-4)
        assert scores.std == pytest.approx(np.std(expected, ddof=1), abs=1e-4)


def test_a_better_arm_is_found_and_an_equal_one_is_not(found):
    better, equal = found.rows[1], found.rows[2]
    assert better.differences[OOD_MEAN].significant
    assert better.differences[OOD_MEAN].low > 0
    assert not any(d.significant for d in equal.differences.values())
    assert better.ood_rank == 1.0
    assert found.notes == []  # run.json and predictions agree
    for row in found.rows[1:]:
        for column, d in row.differences.items():
            assert d.difference == pytest.approx(row.scores[column].mean - found.rows[0].scores[column].mean, abs=1e-6)
            assert d.low <= d.difference <= d.high
            assert d.p >= found.smallest_p


def test_order_changes_nothing(runs, found, tmp_path):
    """Of the examples in the files, and of the runs behind the baseline; a run less does not touch the others."""
    write_run(tmp_path / "better", 1, effect=0.5, seeds=[7, 2, 0, 1, 3, 4, 6, 5], shuffle=3)
    other = compared(runs / "vanilla", runs / "equal", tmp_path / "better")
    assert {row.name: row for row in other.rows} == {row.name: row for row in found.rows}
    alone = compared(runs / "vanilla", runs / "better")
    assert alone.rows[1].differences == found.rows[1].differences


def test_baseline_by_name_or_folder(runs):
    by_name = compared(runs / "vanilla", runs / "better", baseline="better")
    assert by_name.rows[0].name == by_name.baseline == "better"
    assert compared(runs / "vanilla", runs / "better", baseline=f"{runs / 'better'}/") == by_name
    with pytest.raises(UserError, match=r"--baseline: 'bettr' is none of the runs \(did you mean 'better'\?\)"):
        compared(runs / "vanilla", runs / "better", baseline="bettr")


def test_readings(runs):
    """A run as trained against the same weights read otherwise."""
    found = compare(read_runs([str(runs / "better"), f"{runs / 'better'}@dense"]), resamples=RESAMPLES)
    assert [row.name for row in found.rows] == ["better", "better read as dense"]
    assert found.rows[1].differences["movies"].difference == 0
    with pytest.raises(UserError, match=r"has no reading 'dens' \(did you mean 'dense'\?\). It has: as-trained, dense"):
        read_runs([str(runs / "better")], "dens")


def test_a_run_trained_in_the_way_asked_for_stands_for_that_reading(runs, tmp_path):
    """vanilla as trained is dense; emoe as trained has its experts."""
    write_run(tmp_path / "emoe", 1, readings=("as-trained", "dense"), seeds=range(8))
    found = compare(read_runs([str(runs / "vanilla"), str(tmp_path / "emoe")], "dense"), resamples=RESAMPLES)
    assert [row.reading for row in found.rows] == ["as-trained", "dense"]
    assert "vanilla has no reading 'dense': it was trained that way, so it is read as trained" in found.notes
    found = compare(read_runs([str(runs / "vanilla"), str(tmp_path / "emoe")], "emoe"), resamples=RESAMPLES)
    assert [row.reading for row in found.rows] == ["emoe", "as-trained"]


def test_one_sweep_stands_for_what_it_chose(runs):
    chosen = {"plain": "vanilla", "ours": "better"}
    (runs / "sweep.json").write_text(json.dumps({"chosen": chosen, "groups": {"": list(chosen)}}))
    try:
        assert [run.name for run in read_runs([str(runs)])] == ["plain", "ours"]
        (runs / "sweep.json").write_text(json.dumps({"chosen": chosen, "groups": {"a 1": ["plain"], "a 2": ["ours"]}}))
        with pytest.raises(UserError, match="not to be mixed"):
            read_runs([str(runs)])
        (runs / "sweep.json").write_text(json.dumps({"groups": {}}))
        with pytest.raises(UserError, match=r"sweep.json is no record of a sweep: chosen: Field required"):
            read_runs([str(runs)])
    finally:
        (runs / "sweep.json").unlink()


def test_the_validation_set_is_not_compared(tmp_path):
    for arm in range(2):
        write_run(tmp_path / f"arm{arm}", arm, validation=0.8)
    assert "movies-validation" not in compared(tmp_path / "arm0", tmp_path / "arm1").columns


def test_predictions_and_record_disagree(runs, tmp_path):
    """Predictions touched by someone: they count, and it is said."""
    folder = write_run(tmp_path / "touched", 3, seeds=range(8))
    labels, _ = truth("tweets", 200)
    write_predictions(folder / "seed-2" / "predictions" / "as-trained" / "tweets.jsonl", labels, labels)
    notes = compared(runs / "vanilla", folder).notes
    assert any(re.match(r"touched, seed 2, tweets: run.json says .*, its predictions 100.000", note) for note in notes)


@pytest.mark.parametrize("scores", [[0.1, 0.9], [0.1, 0.8, 0.1]])
def test_f1_is_that_of_the_task_s_labels(scores, tmp_path):
    """A third label that neither the domain nor an arm has; each line of a file has a score for each label."""
    labels, said = np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])
    expected = 100 * f1_score(labels, said, average="binary" if len(scores) == 2 else "macro")
    for arm in ("one", "two"):
        folder = write_run(tmp_path / arm, seeds=[0], domains={"movies": "id-test"}, examples=4)
        record = json.loads((folder / "seed-0" / "run.json").read_text())
        record["readings"]["as-trained"]["movies"] |= {"metric": "f1", "score": expected / 100}
        (folder / "seed-0" / "run.json").write_text(json.dumps(record))
        rows = [
            {"id": f"x{i}", "label": int(labels[i]), "prediction": int(said[i]), "scores": scores} for i in range(4)
        ]
        path = folder / "seed-0" / "predictions" / "as-trained" / "movies.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compared(tmp_path / "one", tmp_path / "two")
    assert [row.scores["movies"].mean for row in found.rows] == pytest.approx([expected] * 2)
    assert not any("run.json says" in note for note in found.notes)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["{vanilla}"], "compare: give two run folders or more"),
        (["{vanilla}", "{nowhere}"], "nowhere is not a folder"),
        (["{vanilla}", "{vanilla}"], "was given twice"),
        (["{vanilla}", "{empty}"], "empty has no finished run (no seed-*/run.json)"),
        (["{vanilla}/.."], "it holds run folders, give those: better, equal, vanilla"),
        (["{vanilla}", "{better}", "--format", "pdf"], "--format: unknown 'pdf'"),
        (["{vanilla}", "{better}", "--output", "{empty}/x.pdf"], "--format: 'x.pdf' tells no format"),
        (["{vanilla}", "{better}", "--output", "{empty}/no/x.md"], "--output: "),
        (["{vanilla}", "{better}", "--resamples", "3"], "--resamples: must be at least 100, got 3"),
        (["{vanilla}", "{damaged}"], "amazon.jsonl is damaged"),
        (["{vanilla}", "{gone}"], "tweets.jsonl is missing"),
        (["{vanilla}", "{twice}"], "names example 'x1' twice"),
        (["{vanilla}", "{record}"], "run.json is not a record of a run: steps"),
        (["{vanilla}", "{spam}"], "the runs are of different tasks (sentiment, spam)"),
        (["{vanilla}", "{nan}"], "lines without id, label or a finite prediction"),
        (["{vanilla}", "{infinite}"], "lines without id, label or a finite prediction"),
    ],
)
def test_bad_input(arguments, complaint, runs, tmp_path, capsys):
    copies = ("damaged", "gone", "twice", "record", "nan", "infinite")
    names = {name: tmp_path / name for name in ("empty", "nowhere", "spam", *copies)}
    names["empty"].mkdir()
    for name in copies:
        if f"{{{name}}}" in arguments:
            shutil.copytree(runs / "equal", names[name])
    if "{spam}" in arguments:
        write_run(names["spam"], 3, task="spam")
    seed = "seed-1/predictions/as-trained"
    edit = {
        "damaged": lambda p: (p / seed / "amazon.jsonl").write_text('{"id": "x0", "label": 1, "predic'),
        "gone": lambda p: (p / seed / "tweets.jsonl").unlink(),
        "twice": lambda p: (p / seed / "movies.jsonl").write_text('{"id":"x1","label":1,"prediction":1}\n' * 2),
        "nan": lambda p: (p / seed / "movies.jsonl").write_text('{"id":"x1","label":1}\n'),
        "infinite": lambda p: (p / seed / "movies.jsonl").write_text('{"id":"x1","label":NaN,"prediction":1}\n'),
        "record": lambda p: (p / "seed-0" / "run.json").write_text(
            json.dumps({k: v for k, v in json.loads((p / "seed-0" / "run.json").read_text()).items() if k != "steps"})
        ),
    }
    for name, change in edit.items():
        if names[name].exists():
            change(names[name])
    typed = [a.format(vanilla=runs / "vanilla", better=runs / "better", **names) for a in arguments]
    capsys.readouterr()
    assert main(["compare", *typed, "--quiet"]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
