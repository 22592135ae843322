import csv
import io
import json
import os
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm.config import FolderSection
from ldm.data import folder as folder_module
from ldm.data import index as index_module
from ldm.data.caption_files import caption_of
from ldm.data.folder import FolderSource
from ldm.data.images import decode
from ldm.errors import UserError

NAMES = ["a.png", "sub/b c.PNG", "sub/deep/é.jpeg", "test/x-train.webp", "z\n.gif"]


def picture(red: int = 1, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 8), (red, 0, 0)).save(file, kind)
    return file.getvalue()


def write(folder: Path, *names: str | bytes, content: str | bytes | None = None) -> Path:
    """Write files of one content, or pictures of which number i has red 9 i."""
    for i, name in enumerate(names):
        path = os.path.join(os.fsencode(folder), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(picture(9 * i) if content is None else content.encode() if isinstance(content, str) else content)
    return folder


def metadata(folder: Path, rows: list[dict], kind: str = "jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    elif kind == "csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:  # as spreadsheets write it
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def open_folder(path: Path, cache: Path | None = None, read=decode, **options) -> FolderSource:
    names = {"caption_column": "text", "caption_template": "{caption}", "caption_prefix": "", "caption_suffix": ""}
    return FolderSource(FolderSection(kind="folder", path=str(path), **{**names, **options}), read, cache)


def captions(path: Path, **options) -> dict[str, list[str]]:
    source = open_folder(path, **options)
    return {name: list(texts) for name, texts in zip(source.index.names, source.captions(), strict=True)}


# ---------------------------------------------------------------------------------------------------------- pictures


def test_pictures_are_found_anywhere_below_and_sorted(tmp_path):
    source = open_folder(write(tmp_path / "set", *reversed(NAMES)))
    assert source.index.names == sorted(NAMES)
    assert len(source) == 5
    assert source.sizes().tolist() == [[12, 8]] * 5
    row = source[1]
    assert row["image"].shape == (8, 12, 3) and row["image"][0, 0].tolist() == [27, 0, 0]
    assert list(row["captions"]) == list(source.captions()[1]) == ["b c"]


def test_what_is_hidden_is_passed_over(tmp_path):
    folder = write(tmp_path / "set", "a.png", ".b.png", ".trash/c.png", "__MACOSX/._a.png")
    assert open_folder(folder).index.names == ["a.png"]


def test_names_that_are_no_text(tmp_path):
    folder = write(tmp_path / "set", b"caf\xe9.png", "two\nlines.png", " space .png")
    source = open_folder(folder, tmp_path / "cache")
    assert source.index.names == [" space .png", "caf\udce9.png", "two\nlines.png"]
    assert source.index.faults == [""] * 3
    assert [row["captions"] for row in (source[0], source[1], source[2])] == [("space",), ("caf",), ("two lines",)]
    assert open_folder(folder, tmp_path / "cache").index.names == source.index.names


def test_links_are_followed_and_loops_survived(tmp_path):
    folder = write(tmp_path / "set", "real/a.png", "b.png")
    write(tmp_path / "elsewhere", "c.png")
    (folder / "real" / "loop").symlink_to(folder)
    (folder / "self").symlink_to("self")
    (folder / "again").symlink_to("real")  # comes before it in order, and is still not the name it goes by
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "d.png").symlink_to("b.png")
    source = open_folder(folder)
    assert source.index.names == ["b.png", "d.png", "more/c.png", "real/a.png"]


def test_a_link_to_nothing_is_a_broken_picture(tmp_path):
    folder = write(tmp_path / "set", "a.png")
    (folder / "b.png").symlink_to("gone.png")
    (folder / "c.png").symlink_to("c.png")
    os.mkfifo(folder / "pipe.png")  # opening it would wait for ever
    index = open_folder(folder).index
    assert index.names == ["a.png", "b.png", "c.png"]
    assert index.faults[0] == "" and all("cannot be read" in fault for fault in index.faults[1:])


def test_a_broken_picture_is_a_fault_with_its_name(tmp_path):
    folder = write(tmp_path / "set", "a.png", "b.png")
    write(folder, "c.png", content=b"")
    source = open_folder(folder)
    assert source.index.faults[:2] == ["", ""] and "picture" in source.index.faults[2]
    with pytest.raises(UserError, match=r"set/c\.png: "):
        source[2]


@pytest.mark.parametrize("change", ["removed", "changed", "cut"])
def test_a_picture_that_changes_while_it_is_trained_on_ends_the_run(tmp_path, change):
    folder = write(tmp_path / "set", "a.png", "b.png")
    source = open_folder(folder)
    path = folder / "b.png"
    if change == "removed":
        path.unlink()
    else:
        path.write_bytes(picture(200) if change == "changed" else path.read_bytes()[:-20])
    assert source[0]["image"].shape == (8, 12, 3)
    with pytest.raises(UserError, match=r"set/b\.png was there when training began .*run the same command again"):
        source[1]


def test_it_reaches_loader_processes(tmp_path):
    source = pickle.loads(pickle.dumps(open_folder(write(tmp_path / "set", *NAMES), tmp_path / "cache")))
    assert source[0]["image"].shape == (8, 12, 3)


def test_pictures_are_decoded_as_asked(tmp_path):
    assert open_folder(write(tmp_path, "a.png"), read=partial(decode, channels=4))[0]["image"].shape == (8, 12, 4)


# ------------------------------------------------------------------------------------------------------------- index


def test_the_index_is_kept_and_follows_the_files(tmp_path, monkeypatch):
    folder, cache = write(tmp_path / "set", *NAMES, content=picture(50)), tmp_path / "cache"
    first = open_folder(folder, cache)
    assert [path.name.split("-")[0] for path in cache.glob("*.parquet")] == ["folder"]
    seen = []
    look = index_module._look
    monkeypatch.setattr(index_module, "_look", lambda read, i: seen.append(i) or look(read, i))
    monkeypatch.chdir(tmp_path)
    assert open_folder(Path("set"), cache).fingerprint() == first.fingerprint()
    assert seen == []  # the same folder under another name
    before = os.stat(folder / "a.png")
    write(folder, "a.png", content=picture(77))
    os.utime(folder / "a.png", ns=(before.st_atime_ns, before.st_mtime_ns))  # as archives and copies leave it
    assert os.stat(folder / "a.png").st_size == before.st_size
    assert open_folder(folder, cache).fingerprint() != first.fingerprint()
    assert seen == [0]


def test_two_folders_in_one_cache(tmp_path):
    cache = tmp_path / "cache"
    for name in ("one", "two"):
        open_folder(write(tmp_path / name, "a.png"), cache)
    assert len(list(cache.glob("*.parquet"))) == 2


def test_the_fingerprint_is_of_bytes_captions_and_order(tmp_path):
    def fingerprint(place: str, names=("a.png", "b.png"), **options) -> str:
        return open_folder(write(tmp_path / place, *names), **options).fingerprint()

    same = fingerprint("one")
    assert fingerprint("two") == same
    assert fingerprint("captions", caption_prefix="a ") != same
    assert fingerprint("order", ("b.png", "a.png")) != same
    assert fingerprint("more", ("a.png", "b.png", "c.png")) != same
    write(tmp_path / "two", "b.png", content=picture(5))
    assert open_folder(tmp_path / "two").fingerprint() != same


# ---------------------------------------------------------------------------------------------------------- metadata


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_metadata(tmp_path, capsys, kind):
    folder = write(tmp_path, *NAMES)
    texts = [f'Nº {i},\n  "ein" {name}' for i, name in enumerate(NAMES)]
    rows = [{"file_name": f"./{name}", "text": text, "artist": "Ann"} for name, text in zip(NAMES, texts, strict=True)]
    metadata(folder, rows, kind)
    assert captions(folder, caption_template="{caption} ({artist})") == {
        name: [f'Nº {i}, "ein" {" ".join(name.split())} (Ann)'] for i, name in enumerate(NAMES)
    }
    assert capsys.readouterr().out == f"  captions of {tmp_path}: metadata.{kind}, column 'text'\n"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_several_captions(tmp_path, kind):
    folder = write(tmp_path, "a.png", "b.png", "c.png")
    rows = [
        {"file_name": "a.png", "text": json.dumps(["one", " ", "two"])},
        {"file_name": "b.png", "text": "[1] no list"},
        {"file_name": "c.png", "text": "first row"},
        {"file_name": "c.png", "text": "second row"},
    ]
    metadata(folder, rows, kind)
    expected = {"a.png": ["one", "two"], "b.png": ["[1] no list"], "c.png": ["first row", "second row"]}
    assert captions(folder) == expected


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_lists_and_nulls(tmp_path, kind):
    folder = write(tmp_path, "a.png", "b.png", "c.png")
    rows = [{"file_name": "a.png", "text": ["one", "two"]}, {"file_name": "b.png", "text": []},
            {"file_name": "c.png", "text": None}]  # fmt: skip
    metadata(folder, rows, kind)
    assert captions(folder) == {"a.png": ["one", "two"], "b.png": [""], "c.png": [""]}


def test_a_field_that_some_lines_leave_out_is_empty_there(tmp_path):
    folder = write(tmp_path, "a.png", "b.png")
    metadata(folder, [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": "b", "tag": "t"}])
    assert captions(folder, caption_template="{caption}:{tag}") == {"a.png": ["a:"], "b.png": ["b:t"]}


def test_metadata_in_subfolders(tmp_path, capsys):
    folder = write(tmp_path, "train/a.png", "train/deep/b.png", "test/a.png")
    metadata(folder / "train", [{"file_name": "a.png", "text": "one"}, {"file_name": "deep/b.png", "text": "two"}])
    metadata(folder / "test", [{"file_name": "a.png", "text": "three"}])
    assert captions(folder) == {"test/a.png": ["three"], "train/a.png": ["one"], "train/deep/b.png": ["two"]}
    said = capsys.readouterr().out
    assert "metadata.jsonl of 2 folders, column 'text'" in said
    assert "train/ and test/ are taken together" in said
    metadata(folder, [{"file_name": "test/a.png", "text": "four"}])
    with pytest.raises(UserError, match=r"line 1: test/a\.png is listed in another metadata file"):
        open_folder(folder)


def test_pictures_that_are_not_listed_and_listed_ones_that_are_not_there(tmp_path):
    folder = write(tmp_path / "set", "a.png", "b.png", "picture of no suffix")
    write(tmp_path, "outside.png")
    names = ["a.png", "gone.png", "../outside.png", str(tmp_path / "outside.png"), "picture of no suffix", ".", "\0"]
    metadata(folder, [{"file_name": name, "text": "x"} for name in names])
    source = open_folder(folder)
    found = {
        n: (list(c), f) for n, c, f in zip(source.index.names, source.captions(), source.index.faults, strict=True)
    }
    assert found == {
        "a.png": (["x"], ""),
        "b.png": ([""], ""),
        "picture of no suffix": (["x"], ""),
        "gone.png": (["x"], "listed in metadata.jsonl, not there"),
        ".": (["x"], "listed in metadata.jsonl, not there"),
        "\0": (["x"], "listed in metadata.jsonl, not there"),
        "../outside.png": (["x"], "listed in metadata.jsonl, but outside the folder"),
        str(tmp_path / "outside.png"): (["x"], "listed in metadata.jsonl, but outside the folder"),
    }
    with pytest.raises(UserError, match="not there"):
        source[source.index.names.index("gone.png")]


def test_names_written_in_another_normal_form_are_the_same(tmp_path):
    folder = write(tmp_path, "cafe\u0301.png")
    metadata(folder, [{"file_name": "caf\u00e9.png", "text": "x"}])
    assert captions(folder) == {"cafe\u0301.png": ["x"]}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_wrong_column_names_those_there_are(tmp_path, kind):
    folder = write(tmp_path, "a.png")
    path = metadata(folder, [{"file_name": "a.png", "caption": "x", "tags": "y"}], kind)
    with pytest.raises(UserError, match=r"no column 'text' \(data.caption_column\); it has: file_name, caption, tags"):
        open_folder(folder)
    with pytest.raises(UserError, match=r"(line 2|line 1|row 0): data.caption_template") as error:
        open_folder(folder, caption_column="caption", caption_template="{caption}{artist}")
    assert "{artist}" in str(error.value) and "tags" in str(error.value)
    path.unlink()
    metadata(folder, [{"image": "a.png", "text": "x"}], kind)
    with pytest.raises(UserError, match=r"no column 'file_name', .*; it has: image, text"):
        open_folder(folder)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n\n{"file_name": \n', "jsonl, line 3: not JSON"),
        ("metadata.jsonl", '["a.png", "x"]\n', "line 1: not a JSON object but list"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "x"}\n{"text": "\xe9"}\n', "line 2: not UTF-8"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 5}\n', "line 1: the caption in column 'text' is int"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": ["x", 5]}\n', "'text' is int, not text"),
        ("metadata.jsonl", '{"file_name": null, "text": "x"}\n', "line 1: file_name is null"),
        ("metadata.jsonl", "", "no column 'file_name', .*it has: none"),
        ("metadata.csv", "file_name,text\na.png,a house, red\n", "metadata.csv, line 2: 3 values under 2 columns"),
        ("metadata.csv", 'file_name,text\na.png,"x\ny"\nb.png\n', "line 4: 1 values under 2"),
        ("metadata.csv", 'file_name,text\na.png,"x\n', "line 2: not CSV"),
        ("metadata.csv", b"file_name,text\na.png,caf\xe9\n", "line 2: not UTF-8"),
        ("metadata.csv", "file_name;text\na.png;x\n", "it has: file_name;text"),
        ("metadata.csv", "", "no column 'file_name'"),
        ("metadata.parquet", "PAR1 and no more", "metadata.parquet is no parquet file"),
    ],
)  # fmt: skip
def test_faults_in_metadata_are_told_with_file_and_line(tmp_path, name, content, told):
    folder = write(tmp_path, "a.png")
    write(folder, name, content=content)
    with pytest.raises(UserError, match=told):
        open_folder(folder)


# ---------------------------------------------------------------------------------------- text files, names of files


def test_text_files_hold_a_caption_in_each_line(tmp_path, capsys):
    folder = write(tmp_path, "a.png", "sub/b.v2.JPG", "c.png", "c.webp")
    write(folder, "a.txt", content="\ufeffa red house \r\n\r\n  by the sea")
    write(folder, "sub/b.v2.TXT", content="b\n")
    write(folder, "c.txt", content=" \n\x00\n")
    write(folder, "README.txt", content="not a caption")
    assert captions(folder, caption_template="{caption} {file_name}", caption_suffix="!") == {
        "a.png": ["a red house a.png!", "by the sea a.png!"],
        "c.png": [""],
        "c.webp": [""],
        "sub/b.v2.JPG": ["b sub/b.v2.JPG!"],
    }
    assert f"  captions of {tmp_path}: NAME.txt beside NAME" in capsys.readouterr().out


def test_a_text_file_in_another_encoding_is_named(tmp_path):
    write(write(tmp_path, "a.png"), "a.txt", content="café".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 \(byte 3: .*save it as UTF-8"):
        open_folder(tmp_path)


def test_names_of_files(tmp_path, capsys):
    folder = write(tmp_path, "b/red_house-03.jpg", "c/2_cats.png", "c/007.png")
    assert captions(folder, caption_prefix="a drawing of ") == {
        "b/red_house-03.jpg": ["a drawing of red house"],
        "c/007.png": ["a drawing of 007"],
        "c/2_cats.png": ["a drawing of 2 cats"],
    }
    said = (
        f"  captions of {tmp_path}: from the names of files, such as 'a drawing of red house' for b/red_house-03.jpg\n"
    )
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("a photo (12).png", "a photo"),
        ("area51.png", "area51"),
        ("IMG_1.png", "IMG"),
        ("blue__bird - 4.jpg", "blue bird"),
        ("12-34.png", "12"),
    ],
)
def test_the_number_at_the_end_is_no_caption(name, caption):
    assert caption_of(name) == caption


# ------------------------------------------------------------------------------------------------------- mixed rules


def test_metadata_beside_text_files_is_an_error(tmp_path):
    folder = write(tmp_path, "a.png", "b.png", "c.png")
    write(folder, "b.txt", "c.txt", "notes.txt", content="x")
    metadata(folder, [{"file_name": "a.png", "text": "x"}])
    with pytest.raises(UserError, match=r"in metadata\.jsonl and, for 2 of 3 pictures, in NAME.txt .* such as b\.txt"):
        open_folder(folder)


@pytest.mark.parametrize("other", ["metadata.csv", "sub/metadata.csv"])
def test_two_kinds_of_metadata_are_an_error(tmp_path, other):
    folder = write(tmp_path, "a.png")
    metadata(folder, [{"file_name": "a.png", "text": "x"}])
    write(folder, other, content="file_name,text\n")
    with pytest.raises(UserError, match=r"in metadata\.csv and in metadata\.jsonl"):
        open_folder(folder)


def test_text_files_called_after_the_whole_name_do_not_go_unseen(tmp_path):
    folder = write(tmp_path, "a.png", "b.png")
    write(folder, "a.png.txt", content="a house")
    with pytest.raises(UserError, match=r"1 pictures have their caption in a file called like a\.png\.txt.*rename"):
        open_folder(folder)


def test_names_that_a_camera_gave_are_no_captions(tmp_path):
    folder = write(tmp_path, *(f"IMG_{i:04d}.png" for i in range(12)))
    with pytest.raises(UserError, match=r"would make 12 of 12 'IMG'.*NAME\.txt"):
        open_folder(folder)


def test_text_files_for_a_part_only(tmp_path):
    folder = write(tmp_path, "a.png", "b.png", "c.png", "d.png")
    write(folder, "b.txt", "c.txt", content="x")
    with pytest.raises(UserError, match=r"2 of 4 pictures have a NAME.txt .* b\.txt, and 2 have none, such as a\.png"):
        open_folder(folder)
    write(folder, "a.txt", content="x")  # most have one now: d.png has no caption
    assert captions(folder) == {"a.png": ["x"], "b.png": ["x"], "c.png": ["x"], "d.png": [""]}


@pytest.mark.parametrize("kind", [".caption", ".json"])
def test_captions_of_a_wrong_suffix_do_not_go_unseen(tmp_path, kind):
    folder = write(tmp_path, "a.png", "b.png")
    write(folder, f"a{kind}", content="x")
    with pytest.raises(UserError, match=rf"1 of 2 pictures have a NAME\{kind} .* a\{kind}, which is not read"):
        open_folder(folder)


# ------------------------------------------------------------------------------------------------------- bad folders


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match=r"data\.path=.*nowhere there is no such folder|nowhere: there is no such"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"a\.png: is a file; name the folder"):
        open_folder(write(tmp_path, "a.png") / "a.png")


def test_a_folder_without_pictures_says_what_it_holds(tmp_path):
    with pytest.raises(UserError, match="the folder is empty"):
        open_folder(tmp_path)
    write(tmp_path, "a.txt", "LICENSE", content="x")
    with pytest.raises(UserError, match=r"no pictures .* there are: .*\.txt \(1\)"):
        open_folder(tmp_path)
    write(tmp_path, "data/1.parquet", "data/2.parquet", content="x")
    with pytest.raises(UserError, match=r"\.parquet \(2\).*data=hub reads \.parquet"):
        open_folder(tmp_path)


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    folder = write(tmp_path / "set", "a.png", "locked/b.png")
    scandir = os.scandir

    def refusing(path):  # whoever runs the tests may be allowed everything
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(folder_module.os, "scandir", refusing)
    with pytest.raises(UserError, match=r"set/locked cannot be read: Permission denied; .*chmod"):
        open_folder(folder)


def test_pictures_without_a_decoder_are_told(tmp_path, capsys):
    folder = write(tmp_path, "a.png")
    write(folder, "b.HEIC", "c.heic", content="x")
    assert open_folder(folder).index.names == ["a.png"]
    assert f"  of {tmp_path} 2 .heic are passed over: no decoder" in capsys.readouterr().out


def test_sizes_are_those_of_the_pictures_as_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    source = open_folder(tmp_path)
    assert source.sizes().tolist() == [[20, 40]]
    assert np.asarray(source[0]["image"]).shape == (40, 20, 3)
