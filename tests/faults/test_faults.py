"""Whatever is damaged, hostile or full: one line that says so and status 2, or the work is done."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.faults import FAULTS, TASKS


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.verb}: {fault.name}")
def test_fault(fault, nursery, inputs, tmp_path):
    if fault.why_not:
        pytest.skip(fault.why_not)
    verdict = fault.run(nursery, inputs, tmp_path / "bench")
    assert verdict.survived, verdict.said


def test_nothing_in_a_checkpoint_was_run():
    """The hostile files above run ``touch owned`` if anything of them is run."""
    assert not Path("owned").exists()


def test_digests_are_those_of_sha256sum(inputs):
    """Anybody can check a converted checkpoint."""
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=inputs["converted"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    shards = sorted(p.name for p in inputs["converted"].glob("*.safetensors"))
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == shards


def test_digests_of_a_model_that_was_saved_elsewhere_are_not_asked_for(inputs, tmp_path):
    """save_pretrained after training writes other weights and no record."""
    import transformers

    from emoe.checkpoint.digests import check_digests

    assert len(check_digests(inputs["converted"])) == 6
    transformers.AutoModelForCausalLM.from_pretrained(inputs["converted"]).save_pretrained(tmp_path / "tuned")
    assert check_digests(tmp_path / "tuned") == {}


def test_what_cannot_be_tried_here_is_shown(monkeypatch):
    """Not left out."""
    mounting = {(fault.verb, fault.name) for fault in FAULTS if fault.mounts}
    assert {verb for verb, _ in mounting} == set(TASKS) - {"convert --overwrite", "export --overwrite", "pretrain"}
    monkeypatch.setattr("support.bench.can_mount", lambda: False)
    assert {(fault.verb, fault.name) for fault in FAULTS if fault.why_not} == mounting
