"""`emoe compare` on made-up runs: what it finds, what it says of runs that do not fit, and what it prints."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from sklearn.metrics import f1_score
from support.runs import DOMAINS, answers, balanced_accuracy, truth, write_predictions, write_run

from emoe.cli.main import main
from emoe.errors import UserError
from emoe.evaluation.compare import OOD_MEAN, compare
from emoe.evaluation.runs import read_runs
from emoe.report.comparison import as_csv, as_json, as_latex, as_markdown, latex_escape, statements
from emoe.report.comparison_html import as_html

RESAMPLES = 200


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A baseline, a better arm, an equal one; 8 seeds."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "vanilla", 0, seeds=range(8), readings=("as-trained", "emoe"))
    write_run(folder / "better", 1, effect=0.5, seeds=range(8), readings=("as-trained", "dense"))
    write_run(folder / "equal", 2, seeds=range(8))
    return folder


@pytest.fixture(scope="module")
def found(runs):
    return of(runs / "vanilla", runs / "better", runs / "equal")


def of(*folders, **options):
    return compare(read_runs([str(f) for f in folders]), resamples=RESAMPLES, **options)


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
    other = of(runs / "vanilla", runs / "equal", tmp_path / "better")
    assert {row.name: row for row in other.rows} == {row.name: row for row in found.rows}
    alone = of(runs / "vanilla", runs / "better")
    assert alone.rows[1].differences == found.rows[1].differences


def test_baseline_by_name_or_folder(runs):
    by_name = of(runs / "vanilla", runs / "better", baseline="better")
    assert by_name.rows[0].name == by_name.baseline == "better"
    assert of(runs / "vanilla", runs / "better", baseline=f"{runs / 'better'}/") == by_name
    with pytest.raises(UserError, match=r"--baseline: 'bettr' is none of the runs \(did you mean 'better'\?\)"):
        of(runs / "vanilla", runs / "better", baseline="bettr")


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


def test_unequal_seeds_are_intersected_and_said(runs, tmp_path):
    write_run(tmp_path / "short", 3, seeds=[1, 3, 9])
    (tmp_path / "short" / "seed-5").mkdir()
    found = of(runs / "vanilla", tmp_path / "short")
    assert found.seeds == [1, 3]
    notes = " ".join(found.notes)
    assert "short: seeds not finished and left out: 5" in notes
    assert "vanilla: seeds left out because another run lacks them: 0, 2, 4, 5, 6, 7" in notes
    write_run(tmp_path / "other", 3, seeds=[100])
    with pytest.raises(UserError, match="no finished seed in common"):
        of(runs / "vanilla", tmp_path / "other")


def test_a_missing_domain_is_left_out_and_said(runs, tmp_path):
    write_run(tmp_path / "less", 3, seeds=range(8), domains={"movies": "id-test", "tweets": "ood"})
    found = of(runs / "vanilla", tmp_path / "less")
    assert found.columns == ["movies", "tweets"]  # one OOD domain needs no mean
    assert "domain amazon left out: not scored for less" in found.notes
    write_run(tmp_path / "none", 3, seeds=range(8), domains={"news": "ood"})
    with pytest.raises(UserError, match="no test domain in common"):
        of(runs / "vanilla", tmp_path / "none")


def test_the_validation_set_is_not_compared(tmp_path):
    for arm in range(2):
        write_run(tmp_path / f"arm{arm}", arm, validation=0.8)
    assert "movies-validation" not in of(tmp_path / "arm0", tmp_path / "arm1").columns


def test_examples_are_intersected_and_said(runs, tmp_path):
    """Scored with a limit: only what both saw counts, for both."""
    write_run(tmp_path / "limited", 1, effect=0.5, seeds=range(8))
    labels, _ = truth("amazon", 200)
    for seed in range(8):
        path = tmp_path / "limited" / f"seed-{seed}" / "predictions" / "as-trained" / "amazon.jsonl"
        write_predictions(path, labels[:50], answers("amazon", 200, seed, 1, 0.5, 0.05)[:50])
    found = of(runs / "vanilla", tmp_path / "limited")
    assert "domain amazon: 50 examples of up to 200 were scored in every run; those count" in found.notes
    expected = 100 * balanced_accuracy(labels[:50], answers("amazon", 200, 0, 0, 0.0, 0.05)[:50])
    assert found.rows[0].scores["amazon"].by_seed[0] == pytest.approx(expected, abs=1e-4)


def test_other_labels_for_the_same_examples(runs, tmp_path):
    folder = write_run(tmp_path / "other", 3, seeds=range(8))
    labels, _ = truth("amazon", 200)
    path = folder / "seed-4" / "predictions" / "as-trained" / "amazon.jsonl"
    write_predictions(path, 1 - labels, labels)
    with pytest.raises(UserError, match="domain amazon: other has other labels for the same examples"):
        of(runs / "vanilla", folder)


def test_predictions_and_record_disagree(runs, tmp_path):
    """Predictions touched by someone: they count, and it is said."""
    folder = write_run(tmp_path / "touched", 3, seeds=range(8))
    labels, _ = truth("tweets", 200)
    write_predictions(folder / "seed-2" / "predictions" / "as-trained" / "tweets.jsonl", labels, labels)
    notes = of(runs / "vanilla", folder).notes
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
    found = of(tmp_path / "one", tmp_path / "two")
    assert [row.scores["movies"].mean for row in found.rows] == pytest.approx([expected] * 2)
    assert not any("run.json says" in note for note in found.notes)


def test_confounds_are_said(runs, tmp_path):
    write_run(tmp_path / "fast", 3, seeds=range(8), settings={"learning_rate": 0.1}, train_examples=500)
    notes = of(runs / "vanilla", tmp_path / "fast").notes
    assert notes == [
        "fast differs from vanilla in learning_rate 0.1 (vanilla: 0.0001), training texts 500 (vanilla: 2000)"
    ]


def test_processes_are_a_confound_and_what_was_left_out_is_said(runs, tmp_path):
    write_run(tmp_path / "wide", 3, seeds=range(8), processes=2, notes=["domain moon is left out: no such file"])
    notes = of(runs / "vanilla", tmp_path / "wide").notes
    assert notes == ["domain moon is left out: no such file", "wide differs from vanilla in processes 2 (vanilla: 1)"]


def digests(train="t", **sets):
    return {"train": train, "sets": dict.fromkeys(DOMAINS, "s") | sets}


def test_other_test_texts_are_left_out_and_training_texts_refused(tmp_path):
    """Ids may be row numbers: they match whatever the rows hold."""
    write_run(tmp_path / "old", 0)
    write_run(tmp_path / "first", 1, data=digests())
    write_run(tmp_path / "edited", 2, data=digests(amazon="other"))
    found = of(tmp_path / "first", tmp_path / "edited")
    assert found.columns == ["movies", "tweets"]
    assert "domain amazon left out: its texts changed between the runs" in found.notes
    assert of(tmp_path / "old", tmp_path / "first").columns == [*DOMAINS, OOD_MEAN]  # unknown is let through
    write_run(tmp_path / "none", 2, data=digests(**dict.fromkeys(DOMAINS, "other")))
    with pytest.raises(UserError, match="the test texts changed between the runs"):
        of(tmp_path / "first", tmp_path / "none")
    write_run(tmp_path / "taught", 2, data=digests("other"))
    with pytest.raises(UserError, match="taught was trained on other texts than first, though with the same settings"):
        of(tmp_path / "first", tmp_path / "taught")


def test_limits_explain_other_texts(tmp_path):
    """What limits and settings choose is a note, as before."""
    write_run(tmp_path / "whole", 0, data=digests())
    less = {"learning_rate": 1e-4, "test_limit": 50, "train_limit": 500}
    write_run(tmp_path / "less", 1, data=digests("fewer", amazon="fewer"), settings=less, train_examples=500)
    found = of(tmp_path / "whole", tmp_path / "less")
    assert found.columns == [*DOMAINS, OOD_MEAN]
    assert any("train_limit 500 (whole: None)" in note for note in found.notes)


def test_seeds_of_other_texts_are_not_one_run(tmp_path):
    write_run(tmp_path / "plain", 0)
    write_run(tmp_path / "mixed", 1, seeds=[0])  # of a version without digests
    write_run(tmp_path / "mixed", 1, seeds=[1, 2], data=digests())
    write_run(tmp_path / "mixed", 1, seeds=[3, 4], data=digests("other"))
    with pytest.raises(UserError, match="mixes runs: its seeds were trained on different texts"):
        of(tmp_path / "plain", tmp_path / "mixed")


@pytest.mark.parametrize("other", [{"method": "dropout"}, {"settings": {"learning_rate": 0.1}}, {"train_examples": 7}])
def test_a_folder_of_several_arms_is_none(other, runs, tmp_path):
    write_run(tmp_path / "mixed", 3, seeds=range(4))
    write_run(tmp_path / "mixed", 3, seeds=range(4, 8), **other)
    with pytest.raises(UserError, match=r"mixes runs: seed 4 has .*give each its own folder"):
        of(runs / "vanilla", tmp_path / "mixed")
    write_run(tmp_path / "other machine", 3, seeds=range(7))
    write_run(tmp_path / "other machine", 3, seeds=[7], torch="3.0")
    assert "torch 2 and 3.0" in "".join(of(runs / "vanilla", tmp_path / "other machine").notes)


def test_one_seed_is_compared_honestly(tmp_path):
    for arm in range(2):
        write_run(tmp_path / f"arm{arm}", arm, effect=2.0 * arm, seeds=[0])
    found = of(tmp_path / "arm0", tmp_path / "arm1")
    assert found.smallest_p == 1.0
    assert found.rows[1].scores["movies"].std is None
    assert not found.rows[1].differences["movies"].significant
    said = " ".join(statements(found))
    assert "nothing in this table can be significant" in said
    assert "Intervals (95%) and p examples are for new examples alone: one seed tells nothing of other seeds" in said
    assert "new seeds and new examples together" not in said


def test_one_domain_needs_no_holm(found, tmp_path):
    for arm in range(2):
        write_run(tmp_path / f"arm{arm}", arm, domains={"movies": "id-test"})
    assert "Holm" not in " ".join(statements(of(tmp_path / "arm0", tmp_path / "arm1")))
    assert "Holm adjusts p over the 3 domains" in " ".join(statements(found))


def test_the_same_answers_have_no_interval(tmp_path):
    """Models that say one class to everything; so do many before they have learned anything."""
    for arm in range(2):
        folder = write_run(tmp_path / f"arm{arm}", arm)
        for seed in range(5):
            labels, _ = truth("tweets", 200)
            path = folder / f"seed-{seed}" / "predictions" / "as-trained" / "tweets.jsonl"
            write_predictions(path, labels, np.full(200, arm))
    found = of(tmp_path / "arm0", tmp_path / "arm1")
    text = as_markdown(found)
    assert "| arm1 | tweets | +0.00 | – |" in text
    assert "No interval (–): no draw of examples changes the difference" in text


def test_friedman_says_what_it_is_about(found):
    assert "not whether new seeds would" in next(line for line in statements(found) if "Friedman" in line)


@pytest.mark.parametrize(
    ("seeds", "domains", "said"),
    [
        (6, 3, "is 0.031, 0.094 after Holm over 3 domains: no single domain can be significant at 0.05"),
        (6, 3, "that takes 7 seeds."),
        (7, 3, "is 0.016, 0.047 after Holm over 3 domains."),
        (6, 1, "is 0.031."),  # the one p is its own
        (5, 3, "6 seeds are the least, 7 after Holm over 3 domains, 8 to 10"),
        (5, 1, "6 seeds are the least, 8 to 10"),
    ],
)
def test_the_floor_counts_the_domains(seeds, domains, said, tmp_path):
    for arm in range(2):
        write_run(tmp_path / f"arm{arm}", arm, seeds=range(seeds), domains=dict(list(DOMAINS.items())[:domains]))
    assert said in " ".join(statements(of(tmp_path / "arm0", tmp_path / "arm1")))


@pytest.mark.parametrize("seeds", [5, 6])
def test_too_few_seeds_are_named(tmp_path, seeds):
    for arm in range(2):
        write_run(tmp_path / f"arm{arm}", arm, effect=2.0 * arm, seeds=range(seeds))
    text = " ".join(statements(of(tmp_path / "arm0", tmp_path / "arm1")))
    assert ("nothing in this table can be significant" in text) == (seeds < 6)
    assert {5: "0.062", 6: "0.031"}[seeds] in text


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


def test_csv_carries_every_figure(found):
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert len(rows) == len(found.rows) * len(found.columns)
    kept = {(row["run"], row["domain"]): row for row in rows}
    for row in json.loads(as_json(found))["rows"]:
        for domain, scores in row["scores"].items():
            line = kept[row["name"], domain]
            assert [float(line[f"seed_{seed}"]) for seed in found.seeds] == scores["by_seed"]
            assert float(line["mean"]) == scores["mean"]
            for key, value in (row["differences"].get(domain) or {}).items():
                assert (float(line[key]) if line[key] else None) == value
            assert float(line["seconds"]) == row["cost"]["seconds"]


class Page(HTMLParser):
    """Tags, their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_html_escapes_names_and_fetches_nothing(tmp_path):
    evil = '<script>alert("1")<&$x$_'
    write_run(tmp_path / "vanilla", 0)
    write_run(tmp_path / evil, 1, domains=DOMAINS)
    text = as_html(of(tmp_path / "vanilla", tmp_path / evil))
    page = Page(text)
    assert "script" not in page.tags
    assert evil in page.text
    assert page.tags.count("svg") == 2
    links = [value for key, value in page.attributes if key in ("src", "href", "xlink:href") and value[0] != "#"]
    assert links == []
    assert "url(http" not in text


def test_html_is_the_same_each_time(found):
    assert as_html(found) == as_html(found)


def test_latex_is_balanced_and_escaped(found):
    text = as_latex(found)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\toprule") == 3
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert all(line.count("&") == text.split(r"\begin{tabular}{")[1].split("}")[0].count("r") for line in body[:4])
    assert latex_escape(r"a_b&50%\{x}") == r"a\_b\&50\%\textbackslash{}\{x\}"
    assert not set("±−–") & set(text)


def test_markdown_escapes_names(tmp_path):
    write_run(tmp_path / "vanilla", 0)
    write_run(tmp_path / "a|b*", 1)
    text = as_markdown(of(tmp_path / "vanilla", tmp_path / "a|b*"))
    assert r"| a\|b\* |" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4
    for table in tables:
        assert len({line.replace(r"\|", "").count("|") for line in table}) == 1


def test_the_command(runs, tmp_path, capsys):
    folders = [str(runs / "vanilla"), str(runs / "better")]
    assert main(["compare", *folders, "--resamples", "200", "--per-seed"]) == 0
    shown = capsys.readouterr().out
    assert "OOD mean" in shown
    assert "8 seeds in pairs" in shown
    assert "every seed" in shown
    for suffix in ("md", "csv", "json", "html", "tex"):
        target = tmp_path / f"table.{suffix}"
        assert main(["compare", *folders, "--resamples", "200", "--output", str(target), "--quiet"]) == 0
        assert target.read_text()
    capsys.readouterr()
    assert main(["compare", *folders, "--resamples", "200", "--format", "csv", "--quiet"]) == 0
    assert capsys.readouterr().out == (tmp_path / "table.csv").read_text()
