"""One layer in memory at a time computes what the whole model computes; what it remembers does not grow with depth."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from support.tiny import CONFIGS, TEXT, VOCAB, tiny_checkpoint

from emoe.calibration.statistics import NeuronStatistics
from emoe.calibration.stream import StreamedModel
from emoe.checkpoint.reader import CheckpointReader

ENCODERS = ("bert", "roberta")


@pytest.mark.parametrize("family", CONFIGS)
def test_streamed_equals_whole(family, tmp_path):
    """Through embeddings, every layer and the head; in two batches, the second one smaller."""
    folder = tiny_checkpoint(tmp_path, family)
    auto = transformers.AutoModelForMaskedLM if family in ENCODERS else transformers.AutoModelForCausalLM
    tokens = torch.randint(5, VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))
    stream = StreamedModel(CheckpointReader(folder), dtype=torch.float32, batch_tokens=80)
    stream.load_ends()
    states = stream.embed(tokens)
    stream.drop_ends()
    assert all(p.is_meta for p in stream.model.parameters())
    for index in range(stream.reader.num_layers):
        layer = stream.build_layer(index, stream.reader.read(stream.reader.layer_names(index)))
        stream.run_all(layer, index, states)
    stream.load_ends()
    model = auto.from_pretrained(folder).eval()
    with torch.no_grad():
        for i in range(3):
            logits = stream.head_once(tokens[i : i + 1], states.data[i : i + 1]).logits
            torch.testing.assert_close(logits, model(tokens).logits[i : i + 1], rtol=0, atol=1e-6)


def test_hidden_states_past_the_limit_lie_on_disk(tiny_llama, tmp_path):
    tokens = torch.randint(5, VOCAB, (4, 32), generator=torch.Generator().manual_seed(0))
    reader = CheckpointReader(tiny_llama)
    results = []
    for limit in (1 << 30, 0):
        stream = StreamedModel(reader, dtype=torch.float32, batch_tokens=64, memory_limit=limit, folder=tmp_path)
        stream.load_ends()
        states = stream.embed(tokens)
        for index in range(2):
            layer = stream.build_layer(index, reader.read(reader.layer_names(index)))
            stream.run_all(layer, index, states)
        results.append(states.data.clone())
    assert torch.equal(*results)
    assert list(tmp_path.iterdir()) == []  # the file is unlinked as soon as it is mapped


def test_neurons_that_fire_together_have_like_features():
    """Two groups of neurons, each active on its own half of the tokens, are told apart."""
    generator = torch.Generator().manual_seed(0)
    group_F = torch.arange(40) % 2
    on_N = torch.randint(2, (4000,), generator=generator)
    h_NF = torch.rand(4000, 40, generator=generator) * (on_N[:, None] == group_F)
    statistics = NeuronStatistics(40, seed=0, top_fraction=0.25)
    for number, batch in enumerate(h_NF.split(1000)):
        statistics.update(batch, torch.ones(40), number)
    rows_FP = torch.nn.functional.normalize(statistics.features_FP, dim=1)
    likeness_FF = rows_FP @ rows_FP.T
    same = group_F[:, None] == group_F
    off = ~torch.eye(40, dtype=torch.bool)
    assert likeness_FF[same & off].min() > likeness_FF[~same].max()
    summary = statistics.summary()
    torch.testing.assert_close(summary["firing_rate"].sum(), torch.tensor(10.0, dtype=torch.float64))
    torch.testing.assert_close(summary["mean"], h_NF.double().mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(summary["energy"], h_NF.double().square().mean(0), rtol=1e-4, atol=1e-6)


def test_the_output_column_weighs_in():
    """A neuron that writes nothing is never active, however much it fires."""
    statistics = NeuronStatistics(4, seed=0, top_fraction=0.5)
    statistics.update(torch.tensor([[9.0, 1.0, 2.0, 0.5]]), torch.tensor([0.0, 1.0, 1.0, 1.0]), 0)
    assert statistics.active_F.tolist() == [0, 1, 1, 0]


def peak(depth: int, folder) -> int:
    """Peak resident bytes of converting a Llama of `depth` layers of 18 MiB in a process of its own.

    glibc is told to give large blocks back at once: what it keeps differed by up to 90 MB between runs.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "2"}
    code = """
        import sys
        import emoe
        settings = dict(calibration_tokens=2048, held_out_tokens=512, sequence_length=64, checkpoint_seconds=0)
        dense, text, output = sys.argv[1:]
        report = emoe.convert(dense, output=output, calibration=text, experts=16, **settings)
        print(max(report["peak_bytes"].values()))  # of any stage: each one resets the kernel's peak
    """
    folder.mkdir()
    tiny_checkpoint(folder / "dense", "llama", hidden_size=512, intermediate_size=2560, num_hidden_layers=depth)
    (folder / "text.txt").write_text(TEXT * 200)
    paths = [str(folder / name) for name in ("dense", "text.txt", "out")]
    command = [sys.executable, "-c", textwrap.dedent(code), *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.strip().splitlines()[-1])


def test_peak_memory_does_not_grow_with_depth(tmp_path):
    """Measured: 735 MB for 2 layers, 735 for 4, 736 for 8; the 6 further layers have 109 MB."""
    shallow, deep = peak(2, tmp_path / "shallow"), peak(8, tmp_path / "deep")
    added = 6 * (3 * 512 * 2560 + 512 * 512 * 2 + 512 * 256) * 4  # bytes of their largest tensors
    assert added > 105e6
    assert deep - shallow < 0.2 * added, f"{shallow / 1e6:.0f} MB for 2 layers, {deep / 1e6:.0f} MB for 8"
