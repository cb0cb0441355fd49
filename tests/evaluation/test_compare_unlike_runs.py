"""`emoe compare` on runs that do not fit each other: what is left out, what is said, what is refused."""

from __future__ import annotations

import pytest
from support.runs import DOMAINS, answers, balanced_accuracy, compared, truth, write_predictions, write_run

from emoe.errors import UserError
from emoe.evaluation.compare import OOD_MEAN


def test_unequal_seeds_are_intersected_and_said(runs, tmp_path):
    write_run(tmp_path / "short", 3, seeds=[1, 3, 9])
    (tmp_path / "short" / "seed-5").mkdir()
    found = compared(runs / "vanilla", tmp_path / "short")
    assert found.seeds == [1, 3]
    notes = " ".join(found.notes)
    assert "short: seeds not finished and left out: 5" in notes
    assert "vanilla: seeds left out because another run lacks them: 0, 2, 4, 5, 6, 7" in notes
    write_run(tmp_path / "other", 3, seeds=[100])
    with pytest.raises(UserError, match="no finished seed in common"):
        compared(runs / "vanilla", tmp_path / "other")


def test_a_missing_domain_is_left_out_and_said(runs, tmp_path):
    write_run(tmp_path / "less", 3, seeds=range(8), domains={"movies": "id-test", "tweets": "ood"})
    found = compared(runs / "vanilla", tmp_path / "less")
    assert found.columns == ["movies", "tweets"]  # one OOD domain needs no mean
    assert "domain amazon left out: not scored for less" in found.notes
    write_run(tmp_path / "none", 3, seeds=range(8), domains={"news": "ood"})
    with pytest.raises(UserError, match="no test domain in common"):
        compared(runs / "vanilla", tmp_path / "none")


def test_examples_are_intersected_and_said(runs, tmp_path):
    """Scored with a limit: only what both saw counts, for both."""
    write_run(tmp_path / "limited", 1, effect=0.5, seeds=range(8))
    labels, _ = truth("amazon", 200)
    for seed in range(8):
        path = tmp_path / "limited" / f"seed-{seed}" / "predictions" / "as-trained" / "amazon.jsonl"
        write_predictions(path, labels[:50], answers("amazon", 200, seed, 1, 0.5, 0.05)[:50])
    found = compared(runs / "vanilla", tmp_path / "limited")
    assert "domain amazon: 50 examples of up to 200 were scored in every run; those count" in found.notes
    expected = 100 * balanced_accuracy(labels[:50], answers("amazon", 200, 0, 0, 0.0, 0.05)[:50])
    assert found.rows[0].scores["amazon"].by_seed[0] == pytest.approx(expected, abs=1e-4)


def test_other_labels_for_the_same_examples(runs, tmp_path):
    folder = write_run(tmp_path / "other", 3, seeds=range(8))
    labels, _ = truth("amazon", 200)
    path = folder / "seed-4" / "predictions" / "as-trained" / "amazon.jsonl"
    write_predictions(path, 1 - labels, labels)
    with pytest.raises(UserError, match="domain amazon: other has other labels for the same examples"):
        compared(runs / "vanilla", folder)


def test_confounds_are_said(runs, tmp_path):
    write_run(tmp_path / "fast", 3, seeds=range(8), settings={"learning_rate": 0.1}, train_examples=500)
    notes = compared(runs / "vanilla", tmp_path / "fast").notes
    assert notes == [
        "fast differs from vanilla in learning_rate 0.1 (vanilla: 0.0001), training texts 500 (vanilla: 2000)"
    ]


def test_processes_are_a_confound_and_what_was_left_out_is_said(runs, tmp_path):
    write_run(tmp_path / "wide", 3, seeds=range(8), processes=2, notes=["domain moon is left out: no such file"])
    notes = compared(runs / "vanilla", tmp_path / "wide").notes
    assert notes == ["domain moon is left out: no such file", "wide differs from vanilla in processes 2 (vanilla: 1)"]


def digests(train="t", **sets):
    return {"train": train, "sets": dict.fromkeys(DOMAINS, "s") | sets}


def test_other_test_texts_are_left_out_and_training_texts_refused(tmp_path):
    """Ids may be row numbers: they match whatever the rows hold."""
    write_run(tmp_path / "old", 0)
    write_run(tmp_path / "first", 1, data=digests())
    write_run(tmp_path / "edited", 2, data=digests(amazon="other"))
    found = compared(tmp_path / "first", tmp_path / "edited")
    assert found.columns == ["movies", "tweets"]
    assert "domain amazon left out: its texts changed between the runs" in found.notes
    assert compared(tmp_path / "old", tmp_path / "first").columns == [*DOMAINS, OOD_MEAN]  # unknown is let through
    write_run(tmp_path / "none", 2, data=digests(**dict.fromkeys(DOMAINS, "other")))
    with pytest.raises(UserError, match="the test texts changed between the runs"):
        compared(tmp_path / "first", tmp_path / "none")
    write_run(tmp_path / "taught", 2, data=digests("other"))
    with pytest.raises(UserError, match="taught was trained on other texts than first, though with the same settings"):
        compared(tmp_path / "first", tmp_path / "taught")


def test_limits_explain_other_texts(tmp_path):
    """What limits and settings choose is a note, as before."""
    write_run(tmp_path / "whole", 0, data=digests())
    less = {"learning_rate": 1e-4, "test_limit": 50, "train_limit": 500}
    write_run(tmp_path / "less", 1, data=digests("fewer", amazon="fewer"), settings=less, train_examples=500)
    found = compared(tmp_path / "whole", tmp_path / "less")
    assert found.columns == [*DOMAINS, OOD_MEAN]
    assert any("train_limit 500 (whole: None)" in note for note in found.notes)


def test_seeds_of_other_texts_are_not_one_run(tmp_path):
    write_run(tmp_path / "plain", 0)
    write_run(tmp_path / "mixed", 1, seeds=[0])  # of a version without digests
    write_run(tmp_path / "mixed", 1, seeds=[1, 2], data=digests())
    write_run(tmp_path / "mixed", 1, seeds=[3, 4], data=digests("other"))
    with pytest.raises(UserError, match="mixes runs: its seeds were trained on different texts"):
        compared(tmp_path / "plain", tmp_path / "mixed")


@pytest.mark.parametrize("other", [{"method": "dropout"}, {"settings": {"learning_rate": 0.1}}, {"train_examples": 7}])
def test_a_folder_of_several_arms_is_none(other, runs, tmp_path):
    write_run(tmp_path / "mixed", 3, seeds=range(4))
    write_run(tmp_path / "mixed", 3, seeds=range(4, 8), **other)
    with pytest.raises(UserError, match=r"mixes runs: seed 4 has .*give each its own folder"):
        compared(runs / "vanilla", tmp_path / "mixed")
    write_run(tmp_path / "other machine", 3, seeds=range(7))
    write_run(tmp_path / "other machine", 3, seeds=[7], torch="3.0")
    assert "torch 2 and 3.0" in "".join(compared(runs / "vanilla", tmp_path / "other machine").notes)
