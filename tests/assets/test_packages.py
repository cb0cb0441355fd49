"""Fetching package files: what is checked, what is refused, what survives damage. No network: pip is played by us."""

import hashlib
import io
import subprocess
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from emoe.assets import packages
from emoe.assets.manifest import MANIFEST
from emoe.assets.packages import PackageAsset, fetch_package
from emoe.errors import UserError

FILES = {"tiny/model/config.json": b"{}", "tiny/model/weights.bin": b"w" * 1000, "tiny/run.py": b"raise SystemExit"}


def wheel_bytes(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for name, data in files.items():
            wheel.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def asset_of(archive, members, **more):
    fields = {"name": "tiny", "version": "1.0", "licence": "MIT", "size": 2000, **more}
    return PackageAsset(members=members, sha256=hashlib.sha256(archive).hexdigest(), **fields)


class FakeClient:
    """Plays `subprocess.run` of the registry client: leaves ``archive`` in the folder that it is asked to fill."""

    def __init__(self, archive, name="tiny-1.0-py3-none-any.whl", returncode=0, stderr=""):
        self.archive, self.name, self.returncode, self.stderr, self.commands = archive, name, returncode, stderr, []

    def __call__(self, command, **_):
        self.commands.append(command)
        flag = "--dest" if "--dest" in command else "--pack-destination"
        if self.returncode == 0:
            Path(command[command.index(flag) + 1], self.name).write_bytes(self.archive)
        return subprocess.CompletedProcess(command, self.returncode, "", self.stderr)


@pytest.fixture
def client(monkeypatch):
    fake = FakeClient(wheel_bytes(FILES))
    monkeypatch.setattr(packages.subprocess, "run", fake)
    return fake


@pytest.fixture
def asset(client):
    return asset_of(client.archive, {name: None for name in FILES if "/model/" in name})


def leftovers(home):
    return [path.name for path in (home / "assets").glob(".*")]


def test_what_has_come_of_an_archive_is_counted(asset, client, monkeypatch):
    """Its client, which does not say it, keeps it in the same folder until it is whole."""
    shown, enough = [], threading.Event()

    def show(*told):
        shown.append(told)
        if told[1]:
            enough.set()

    def slow(command, env, **options):
        part = Path(env["TMPDIR"], "pip-unpack", "part")
        part.parent.mkdir()
        part.write_bytes(bytes(3 << 20))
        assert enough.wait(10)
        return client(command, **options)

    monkeypatch.setattr(packages, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(packages.subprocess, "run", slow)
    folder = fetch_package(replace(asset, size=8 << 20), show=show)
    assert shown[0] == ("fetching", 0, 8)
    assert {told for told in shown if told[0] == "fetching"} == {("fetching", 0, 8), ("fetching", 3, 8)}
    assert shown[-1] == ("checking", 1, 1)
    shown.clear()
    assert fetch_package(asset, verify=True, show=show) == folder
    assert shown == [("checking", 0, 1), ("checking", 1, 1)]


def test_only_the_named_members_are_unpacked_and_pip_is_asked_once(asset, client, home):
    folder = fetch_package(asset)
    assert folder == home / "assets" / "tiny-1.0"
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert found == {*asset.members, MANIFEST}  # tiny/run.py stays packed
    assert fetch_package(asset) == folder
    assert len(client.commands) == 1
    assert "tiny==1.0" in client.commands[0] and "--no-deps" in client.commands[0]
    assert leftovers(home) == []


def test_a_wrong_archive_is_not_unpacked(asset, client, home):
    wrong = replace(asset, sha256="0" * 64)
    with pytest.raises(UserError, match=f"expected sha256 {'0' * 64}, got {asset.sha256}"):
        fetch_package(wrong)
    assert not wrong.folder.exists() and leftovers(home) == []


def test_a_wrong_member_is_not_kept(asset, client, home):
    wrong = replace(asset, members={"tiny/model/config.json": "1" * 64})
    with pytest.raises(UserError, match=r"checksum mismatch of tiny/model/config\.json"):
        fetch_package(wrong)
    assert not wrong.folder.exists() and leftovers(home) == []


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "tiny/../../outside", "..\\outside"])
def test_members_cannot_climb_out(name, monkeypatch, home):
    archive = wheel_bytes({name: b"x"})
    monkeypatch.setattr(packages.subprocess, "run", FakeClient(archive))
    with pytest.raises(UserError, match="outside of the cache folder"):
        fetch_package(asset_of(archive, {name: None}))
    assert not list(home.parent.rglob("outside"))


def test_a_member_that_is_not_there(asset, client):
    with pytest.raises(UserError, match="has no file 'tiny/none'"):
        fetch_package(replace(asset, members={"tiny/none": None}))


@pytest.mark.parametrize("damage", ["truncated", "deleted", "manifest"])
def test_damage_to_the_cache_is_noticed_and_repaired(damage, asset, client):
    folder = fetch_package(asset)
    weights = folder / "tiny/model/weights.bin"
    if damage == "truncated":
        weights.write_bytes(b"w" * 10)
    elif damage == "deleted":
        weights.unlink()
    else:
        (folder / MANIFEST).write_text("{")
    assert fetch_package(asset) == folder
    assert weights.read_bytes() == FILES["tiny/model/weights.bin"]
    assert len(client.commands) == 2


def test_a_flipped_byte_is_found_by_verify_alone(asset, client):
    weights = fetch_package(asset) / "tiny/model/weights.bin"
    weights.write_bytes(b"W" + b"w" * 999)  # the same size
    fetch_package(asset)
    assert len(client.commands) == 1  # sizes agree: the quick check is content
    fetch_package(asset, verify=True)
    assert len(client.commands) == 2
    assert weights.read_bytes() == FILES["tiny/model/weights.bin"]


def test_two_users_of_one_package_keep_both_their_members(asset, client):
    config, weights = asset.members
    first, second = replace(asset, members={config: None}), replace(asset, members={weights: None})
    fetch_package(first)
    folder = fetch_package(second)
    assert (folder / config).is_file() and (folder / weights).is_file()
    fetch_package(first)
    fetch_package(second)
    assert len(client.commands) == 2


def test_a_new_pin_replaces_the_cached_archive(asset, client):
    fetch_package(asset)
    client.archive = wheel_bytes({**FILES, "tiny/model/config.json": b'{"new": 1}'})
    folder = fetch_package(asset_of(client.archive, asset.members))
    assert (folder / "tiny/model/config.json").read_bytes() == b'{"new": 1}'


def test_fetching_twice_at_once_leaves_one_whole_folder(asset, client, monkeypatch, home):
    barrier = threading.Barrier(2)
    plain = packages._extract

    def together(*arguments):
        barrier.wait(timeout=20)  # both have downloaded before either renames
        plain(*arguments)

    monkeypatch.setattr(packages, "_extract", together)
    threads = [threading.Thread(target=fetch_package, args=(asset,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(client.commands) == 2
    fetch_package(asset, verify=True)
    assert len(client.commands) == 2 and leftovers(home) == []


def test_a_restricted_licence_is_asked_for_on_every_use(asset, client):
    restricted = replace(asset, needs_acceptance=True, licence="academic use only")
    with pytest.raises(UserError, match=r"academic use only.*--accept-license"):
        fetch_package(restricted)
    assert client.commands == []
    fetch_package(restricted, accept_license=True)
    with pytest.raises(UserError, match="--accept-license"):  # cached, but this caller has not agreed
        fetch_package(restricted)


def test_the_clients_error_is_shown(asset, client):
    client.returncode = 1
    client.stderr = "WARNING: Location ignored\nERROR: No matching distribution found for tiny==1.0\n[notice] update"
    with pytest.raises(UserError, match=r"No matching distribution found.*pass a local folder"):
        fetch_package(asset)


def test_no_pip(asset, client):
    client.returncode, client.stderr = 1, "/usr/bin/python: No module named pip"
    with pytest.raises(UserError, match="ensurepip"):
        fetch_package(asset)


def test_no_client_at_all(asset, monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(packages.subprocess, "run", missing)
    with pytest.raises(UserError, match="cannot run npm"):
        fetch_package(replace(asset, client="npm"))


def test_an_npm_package_and_its_links(monkeypatch):
    """Only regular files are read from a tar: a link could show us a file outside."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        entry = tarfile.TarInfo("package/data.txt")
        entry.size = 5
        tar.addfile(entry, io.BytesIO(b"hello"))
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    fake = FakeClient(buffer.getvalue(), name="scope-tiny-1.0.tgz")
    monkeypatch.setattr(packages.subprocess, "run", fake)
    asset = asset_of(buffer.getvalue(), {"package/data.txt": None}, name="@scope/tiny", client="npm")
    folder = fetch_package(asset)
    assert folder.name == "scope-tiny-1.0"
    assert (folder / "package/data.txt").read_bytes() == b"hello"
    assert fake.commands[0][:3] == ["npm", "pack", "@scope/tiny@1.0"]
    with pytest.raises(UserError, match="has no file 'package/link'"):
        fetch_package(replace(asset, members={"package/link": None}))


def test_a_pattern_takes_the_files_of_one_folder(client, home):
    client.archive = wheel_bytes({"t/a/1.txt": b"1", "t/a/2.txt": b"2", "t/a/deep/3.txt": b"3", "t/b/4.txt": b"4"})
    asset = asset_of(client.archive, {"t/a/*.txt": None})
    folder = fetch_package(asset)
    assert sorted(p.name for p in folder.rglob("*.txt")) == ["1.txt", "2.txt"]
    fetch_package(asset)
    assert len(client.commands) == 1
    with pytest.raises(UserError, match="has no file 't/c/"):
        fetch_package(replace(asset, members={"t/c/*.txt": None}))
