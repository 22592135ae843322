"""JSON, and files and folders that are whole or as they were."""

import json
import os
from pathlib import Path

import pytest

from ldm.errors import UserError
from ldm.files import check_writable, file_written_atomically, load_json, load_yaml, save_json, written_atomically


def test_json_round_trip(tmp_path):
    content = {"a": [1, 2.5, None], "é": "日本"}
    save_json(tmp_path / "x.json", content)
    assert load_json(tmp_path / "x.json") == content
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'"text"', b"[" * 100_000, b"1" * 10_000])
def test_json_that_is_no_object(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x.json (cannot be read|holds no JSON object)"):
        load_json(tmp_path / "x.json")


def test_json_that_is_not_there_or_no_file(tmp_path):
    with pytest.raises(UserError, match=r"x.json is missing"):
        load_json(tmp_path / "x.json")
    (tmp_path / "x.json").mkdir()
    with pytest.raises(UserError, match=r"x.json cannot be read"):
        load_json(tmp_path / "x.json")


@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_is_whole_or_as_it_was(tmp_path, old):
    path = tmp_path / "file"
    if old:
        path.write_bytes(old)
    with pytest.raises(OSError, match="disk full"), file_written_atomically(path) as file:
        file.write(b"half")
        raise OSError("disk full")
    assert (path.read_bytes() if old else None) == old
    assert [each.name for each in tmp_path.iterdir()] == (["file"] if old else [])
    with file_written_atomically(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    with written_atomically(tmp_path / "part") as temporary:
        (temporary / "config.json").write_text("whole")
    with pytest.raises(OSError, match="disk full"), written_atomically(tmp_path / "part") as temporary:
        (temporary / "config.json").write_text("half")
        raise OSError("disk full")
    assert {path.name: path.read_text() for path in (tmp_path / "part").iterdir()} == {"config.json": "whole"}
    with pytest.raises(OSError, match="disk full"), written_atomically(tmp_path / "new") as temporary:
        raise OSError("disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_a_folder_whose_place_cannot_be_taken_is_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "old").touch()
    rename = Path.rename

    def broken(self, target):
        if (self / "new").exists():
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="no"), written_atomically(tmp_path / "part") as temporary:
        (temporary / "new").touch()
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["part"]


def test_a_folder_that_is_written_again_keeps_nothing_of_the_old(tmp_path):
    for name in ("old", "new"):
        with written_atomically(tmp_path / "a" / "part") as temporary:
            (temporary / name).touch()
    assert [path.name for path in (tmp_path / "a" / "part").iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["part"]
    assert (tmp_path / "a" / "part").stat().st_mode & 0o777 == 0o755


def test_a_folder_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append(os.fstat(number).st_ino), fsync(number)))
    monkeypatch.setattr(Path, "rename", lambda old, new: (calls.append("rename"), rename(old, new)))
    with written_atomically(tmp_path / "part") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "a").write_text("of another library")
        (temporary / "sub" / "b").touch()
    part = tmp_path / "part"
    assert set(calls[:-2]) == {path.stat().st_ino for path in (part, part / "a", part / "sub", part / "sub" / "b")}
    assert calls[-2:] == ["rename", tmp_path.stat().st_ino]


def test_names_as_long_as_a_file_system_takes(tmp_path):
    name = "ü" * 120 + ".json"
    save_json(tmp_path / name, {"a": 1})
    assert json.loads((tmp_path / name).read_text()) == {"a": 1}


def test_places_that_cannot_be_written(tmp_path, monkeypatch):
    check_writable(tmp_path / "a" / "b", "dst=c")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"dst=x cannot be written: .*file is a file"):
        check_writable(tmp_path / "file", "dst=x")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"no permission to write into {tmp_path}$"):
        check_writable(tmp_path / "a", "dst=b")


@pytest.mark.parametrize("content", [
    b"\xff", b"a: [", b"[1]", b"", b"x", b"[" * 3000, b"a: 2001-02-30", b"!!python/name:os.system ''", b"? [a]\n: b",
    b"a: &a [*a]", b"a: !!int x", b"a: !!timestamp x",
])  # fmt: skip
def test_yaml_of_anything_is_settings_or_told(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml (cannot be read|holds no settings)"):
        load_yaml(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="is missing"):
        load_yaml(tmp_path / "gone.yaml")
