"""Plain text out of packages: formats, the registry, what apt and dpkg leave."""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from pathlib import Path

import pytest

from emoe.assets import markup
from emoe.assets.corpora import CORPORA, corpus_files, read_corpus
from emoe.assets.debian import fetch_debian
from emoe.errors import UserError


def test_formats(tmp_path):
    def file(name: str, text: str, compress: bool = False) -> Path:
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if compress else text.encode())
        return path

    assert markup.plain(file("a.dict.dz", "Größe\n", compress=True)) == "Größe\n"
    page = (
        '<html><title>no</title><h1>Title</h1><p>One  <i>two</i>\nthree &amp; four</p><script>x = "no"</script></html>'
    )
    assert markup.html(file("a.html", page)) == "Title\nOne two three & four\n"
    manual = '.\\" Copyright\n.TH x 5\n.SH "EINS ZWEI"\nDie \\fIDatei\\fP locale\\-gen\n.nf\n\'\\" t\nText\\&.\n'
    assert markup.roff(file("a.5.gz", manual, compress=True)) == "EINS ZWEI\nDie Datei locale-gen\nText.\n"
    line = '00004227 29 v 02 exhale 0 breathe_out 1 001 @ 00001740 v 0000 01 + 02 00 | expel air; "Exhale!"  \n'
    assert markup.glosses(file("data.verb", "  1 A licence | of sorts\n" + line)) == (
        'exhale, breathe out: expel air; "Exhale!"\n'
    )
    tagged = "\n\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' ,/, 1/2/cd ./.\n"
    assert markup.tagged_words(file("ca01", tagged)) == 'The jury said "no evidence", 1/2.\n'


def test_r_data(tmp_path):
    """Two blocks, the second of another kind of vector."""
    strings = [b"It is a truth", b"", "universally – acknowledged".encode()]
    vector = b"X\n\x00\x00\x00\x03" + struct.pack(">ii", 16, len(strings))
    vector += b"".join(struct.pack(">ii", 0x00040009, len(s)) + s for s in strings)
    other = b"X\n\x00\x00\x00\x03" + struct.pack(">iii", 13, 1, 7)
    blocks = (struct.pack(">i", len(block)) + zlib.compress(block) for block in (vector, other))
    (tmp_path / "Rdata.rdb").write_bytes(b"".join(blocks))
    assert markup.r_data(tmp_path / "Rdata.rdb") == "It is a truth\n\nuniversally – acknowledged\n"


def test_this_machine_s_python():
    files = corpus_files("python")
    assert files == sorted(files)
    assert not any("site-packages" in str(path) for path in files)
    assert "def " in next(read_corpus("python"))


def test_registry():
    with pytest.raises(UserError, match="did you mean 'fiction'"):
        corpus_files("fictoin")
    languages = {corpus.language for corpus in CORPORA.values()}
    assert {"en", "de", "fr", "py"} <= languages
    assert len(CORPORA["brown"].package.members) == 500


def test_debian_packages(tmp_path, monkeypatch):
    """Stand-ins for apt-get and dpkg: what matches is kept and found again; failures are one line."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "apt-get").write_text("#!/bin/sh\ntouch $3_1.deb\n")
    (programs / "dpkg").write_text("#!/bin/sh\nmkdir -p $3/usr && echo text > $3/usr/a.txt && echo x > $3/usr/b.bin\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("EMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    folder = fetch_debian("words", "usr/*.txt")
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"a.txt", "manifest.json"}
    (programs / "apt-get").unlink()
    assert fetch_debian("words", "usr/*.txt") == folder  # cached: nothing is run
    monkeypatch.setenv("PATH", str(programs))
    with pytest.raises(UserError, match="cannot run apt-get"):
        fetch_debian("others", "**/*")
    assert not list((tmp_path / "home" / "assets").glob(".download-*"))


def test_a_package_that_cannot_be_had(tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "apt-get").write_text('#!/bin/sh\necho "E: no $3" >&2\nexit 100\n')
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("EMOE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="E: no missing"):
        fetch_debian("missing", "**/*")
