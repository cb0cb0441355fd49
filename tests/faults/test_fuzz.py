"""Readers of files that others wrote: whatever is in them, only `UserError` comes out."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from emoe.checkpoint.converted import read_converted
from emoe.checkpoint.digests import check_digests
from emoe.checkpoint.partition import Partition
from emoe.checkpoint.reader import CheckpointReader, shard_map
from emoe.config import ConvertConfig, ExtendConfig, RecoverConfig, merge_settings, resolve_config
from emoe.conversion.frontier import read_grid
from emoe.errors import UserError
from emoe.evaluation.sweep_config import read_sweep
from emoe.exporting.source import Source
from emoe.plainfiles import read_json, read_yaml
from emoe.report import sections
from emoe.report.inspect import describe
from emoe.report.tables import print_inspection
from emoe.surgery.extend import extend
from emoe.tasks.user import task_from_yaml

bounded = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 1, 10**9, 2**63, 10**40])
PLAIN = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture
def survives():
    """Nothing but `UserError`, of one line on the terminal."""

    @contextlib.contextmanager
    def run():
        try:
            yield
        except UserError as error:
            assert len(str(error)) < 3000

    return run


@bounded
@given(content=st.binary(max_size=200) | PLAIN.map(lambda v: json.dumps(v).encode()))
def test_any_bytes(content, survives, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content)
    for read in (
        lambda: read_json(path),
        lambda: read_yaml(path, "--config"),
        lambda: resolve_config({}, path),
        lambda: merge_settings(RecoverConfig, {}, path),
        lambda: read_grid(path),
        lambda: read_sweep(path),
        lambda: task_from_yaml(path),
        lambda: Partition.load(path),
    ):
        with survives():
            read()


@bounded
@given(text=st.text(alphabet="ab:-[]{}&*!|>?'\"#%@,01.~\n \t", max_size=60))
def test_any_yaml_syntax(text, survives, tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with survives():
        resolve_config({}, path)
    with survives():
        read_grid(path)


@bounded
@given(key=st.sampled_from(sorted(ConvertConfig.model_fields)), value=PLAIN)
def test_any_value_of_any_setting(key, value, survives, tmp_path):
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump({key: value}))
    with survives():
        resolve_config({}, path)


@bounded
@given(data=st.data())
def test_any_value_in_config_json(data, survives, tiny_llama, tmp_path_factory):
    config = json.loads((tiny_llama / "config.json").read_text())
    key = data.draw(st.sampled_from([*sorted(config), "quantization_config", "num_labels", "id2label", "rope_scaling"]))
    folder = tmp_path_factory.mktemp("model")
    (folder / "model.safetensors").symlink_to(tiny_llama / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {key: data.draw(PLAIN)}))
    with survives():
        reader = CheckpointReader(folder)
        assert reader.hidden_width == 48
        assert reader.num_layers == 4


def damage(value: Any, data: st.DataObject) -> Any:
    """The value of a JSON file with something else in one place, however deep."""
    where, key = [value], 0
    while where[key] and isinstance(where[key], dict | list) and (where[key] is value or data.draw(st.booleans())):
        where = where[key]
        key = data.draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
    where[key] = data.draw(PLAIN | st.lists(st.lists(st.integers(-1, 9), max_size=3), min_size=4, max_size=4))
    return value


def linked(source: Path, folder: Path, name: str, value: Any) -> Path:
    """The same checkpoint but for one file."""
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(json.dumps(value))
    return folder


@bounded
@given(data=st.data())
def test_any_value_in_a_converted_config(data, survives, converted_llama, tmp_path_factory):
    config = json.loads((converted_llama / "config.json").read_text())
    folder = linked(converted_llama, tmp_path_factory.mktemp("model"), "config.json", damage(config, data))
    with survives():
        read_converted(folder)
    with survives():
        assert Source(folder).width == 48


@pytest.fixture(scope="module")
def operated(converted_llama, tmp_path_factory):
    """A checkpoint with groups of experts and a history, and with a report and a recovery that are not its own."""
    folder = tmp_path_factory.mktemp("operated") / "model"
    extend(ExtendConfig(model=str(converted_llama), output=str(folder), experts=1), lambda *_: None)
    report = json.loads((converted_llama / "emoe_report.json").read_text())
    report["quality"]["domains"] = {"other": report["quality"] | {"domains": None}}
    (folder / "emoe_report.json").write_text(json.dumps(report))
    row = {"top_k": 2, "active": 0.25, "before": {"a": 9.0}, "after": {"a": 8.0}}
    recovery = {"steps": 1, "minutes": 0.1, "num_experts": 8, "dense": {"a": 7.0}, "rows": [row]}
    (folder / "emoe_recover.json").write_text(json.dumps(recovery))
    return folder


@settings(bounded, max_examples=80)
@given(data=st.data(), name=st.sampled_from(["config.json", "emoe_report.json", "emoe_recover.json"]))
def test_what_is_shown_of_any_checkpoint(data, name, survives, operated, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("emoe.report.inspect._count_parameters", lambda config: 1)  # has a net of its own, and is slow
    found = json.loads((operated / name).read_text())
    folder = linked(operated, tmp_path_factory.mktemp("model"), name, damage(found, data))
    with survives():
        print_inspection(describe(folder))
    with survives():
        sections.conversion(folder)
    with survives():
        sections.recovery(folder)


@bounded
@given(data=st.data())
def test_what_is_shown_of_any_moduleformer(data, survives, tmp_path_factory):
    config = {
        "model_type": "moduleformer",
        "n_layer": 2,
        "n_att_experts": 4,
        "n_mlp_experts": 4,
        "k_att": 1,
        "k_mlp": 2,
    }
    config |= {"att_groups": [[4], [4, 1]], "emoe_provenance": {"history": [{"verb": "extend", "added": {"ffn": 1}}]}}
    folder = tmp_path_factory.mktemp("model")
    save_file({}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(damage(config, data)))
    with survives():
        print_inspection(describe(folder))


@bounded
@given(entries=st.dictionaries(st.text(max_size=30), st.text(max_size=30) | PLAIN, max_size=4) | PLAIN)
def test_any_index(entries, survives, tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "a.safetensors").symlink_to(tiny_llama / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": entries}))
    with survives():
        assert set(shard_map(folder).values()) <= {folder / "a.safetensors"}


@bounded
@given(names=st.lists(st.text(max_size=8).map("model.layers.{}.mlp.down_proj.weight".format) | st.text(), max_size=4))
def test_any_tensor_names(names, survives, tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").symlink_to(tiny_llama / "config.json")
    with contextlib.suppress(UnicodeEncodeError):  # no tensor can have such a name
        tensors = load_file(tiny_llama / "model.safetensors")
        one = tensors["model.norm.weight"]
        save_file(tensors | {name: one.clone() for name in names}, folder / "model.safetensors", {"format": "pt"})
        with survives():
            CheckpointReader(folder)


@bounded
@given(
    header=PLAIN | st.dictionaries(st.sampled_from(["__metadata__", "layers.0.labels", "x"]), PLAIN), rest=st.binary()
)
def test_any_safetensors_header(header, rest, survives, tmp_path):
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)
    with survives():
        Partition.load(path)
    with survives():
        shard_map(tmp_path)


@bounded
@given(
    facts=PLAIN
    | st.fixed_dictionaries({"num_experts": PLAIN, "digests": PLAIN | st.dictionaries(st.sampled_from("0123"), PLAIN)}),
    labels=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=8),
    name=st.sampled_from(["layers.0.labels", "layers.x.labels", "layers", "labels.-1"]),
)
def test_any_partition(facts, labels, name, survives, tmp_path):
    import torch

    path = tmp_path / "partition.safetensors"
    save_file({name: torch.tensor(labels, dtype=torch.int32)}, path, {"emoe": json.dumps(facts)})
    with survives():
        partition = Partition.load(path)
        assert all(len(labels_F) % partition.num_experts == 0 for labels_F in partition.labels.values())


@bounded
@given(content=st.binary(max_size=120))
def test_any_digests(content, survives, tmp_path):
    (tmp_path / "SHA256SUMS").write_bytes(content)
    with survives():
        check_digests(tmp_path)
