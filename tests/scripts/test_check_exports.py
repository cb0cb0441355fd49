"""What goes wrong in checking exports is not taken for what a format cannot represent."""

from __future__ import annotations

import json
import sys

import pytest
from support.scripts import script

from emoe.errors import UserError

check_exports = script("check_exports")

COMPARISON = {
    "reference": "the converted model",
    "tokens": 8,
    "max_difference": 1e-6,
    "kl": 1e-12,
    "agreement": 1.0,
    "perplexity": [2.0, 2.0],
    "choices": None,
}
LOSSY = UserError("--to: mixtral cannot represent this model: mixtral takes a softmax before it chooses")


@pytest.fixture
def check(monkeypatch, tmp_path):
    """``check(outcome, refusal)`` → exit status and page of a run over one export with that outcome."""
    output = tmp_path / "exports.json"

    def call(outcome, refusal):
        def export(*arguments, **settings):
            if isinstance(outcome, Exception):
                raise outcome
            return {"comparisons": [COMPARISON]}

        monkeypatch.setattr(check_exports.emoe, "export", export)
        monkeypatch.setattr(check_exports, "converted", lambda name, folder: folder / name)
        monkeypatch.setattr(check_exports, "EXPORTS", [("late", "mixtral", {}, refusal)])
        monkeypatch.setattr(sys, "argv", ["check_exports.py", "--folder", str(tmp_path), "--output", str(output)])
        try:
            check_exports.main()
        except SystemExit as end:
            return end.code, output.with_suffix(".md").read_text()
        return 0, output.with_suffix(".md").read_text()

    return call


def test_a_format_that_cannot_is_refused_as_it_should_be(check):
    status, page = check(LOSSY, check_exports.SOFTMAX)
    assert status == 0
    assert f"Refused, as it should be:\n\n- late, mixtral: {LOSSY}\n" in page
    assert "Failed" not in page


@pytest.mark.parametrize(
    ("outcome", "refusal"),
    [
        (UserError("--to: the mixtral export computes something else than the model"), None),
        (UserError("--output: 5 GiB are needed, 2 GiB are free"), check_exports.SOFTMAX),
        (LOSSY, check_exports.DENSE_LAYERS),  # refused, for another reason
        (LOSSY, None),
        ("written", check_exports.SOFTMAX),
    ],
)
def test_everything_else_has_failed(outcome, refusal, check):
    status, page = check(outcome, refusal)
    assert status == 1
    assert "Failed:\n\n- late, mixtral: " in page
    assert "as it should be" not in page


def test_what_failed_is_tried_again_and_what_went_well_is_kept(check, tmp_path):
    assert check(LOSSY, None)[0] == 1
    status, page = check("written", None)
    assert status == 0
    assert "Failed" not in page
    assert check(LOSSY, None) == (0, page)
    assert len(json.loads((tmp_path / "exports.json").read_text())["rows"]) == 1
