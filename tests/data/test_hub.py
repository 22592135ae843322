import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from ldm.data.hub import HubSource
from ldm.data.images import decode
from ldm.errors import UserError
from sets import expected, hub_data, pairs, parquet_folder, picture_folder, png, texts


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory, monkeypatch):
    """Keep `datasets` from the user's cache and from its progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()


def opened(data, cache=None) -> HubSource:
    return HubSource(data, decode, cache)


def said(source) -> list[str]:
    return [text for texts in source.captions() for text in texts]


def test_a_card_that_names_its_files_is_obeyed(tmp_path):
    folder = picture_folder(tmp_path / "set", ["one/a.png", "one/b.png", "two/c.png"], metadata=None)
    for name, num in (("one", 2), ("two", 1)):
        rows = [{"file_name": f"{'abc'[i if name == 'one' else 2]}.png", "text": f"{name} {i}"} for i in range(num)]
        (folder / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: two/*\n---\n"
    (folder / "README.md").write_text(card)
    assert said(opened(hub_data(folder))) == ["two 0"]


def test_local_parquet_written_by_datasets(tmp_path):
    source = opened(hub_data(parquet_folder(tmp_path / "set", name="pictures.parquet")))
    assert pairs(source) == expected(5)
    assert said(source) == texts(5)


def test_column_names_are_config(tmp_path):
    folder = parquet_folder(tmp_path / "set", 2, words=["one", "two"], n=[1, 2])
    assert said(opened(hub_data(folder, caption_column="words"))) == ["one", "two"]


def test_a_folder_that_is_called_like_a_loader(tmp_path, monkeypatch):
    parquet_folder(tmp_path / "parquet", 3)
    (tmp_path / "notes.csv").write_text("text,image\nno,no\n")
    monkeypatch.chdir(tmp_path)
    assert pairs(opened(hub_data("parquet"))) == pairs(opened(hub_data("./parquet"))) == expected(3)


def test_several_captions_a_picture(tmp_path):
    lists = parquet_folder(tmp_path / "lists", 3, words=[["a", "b"], ["c", ""], []])
    assert opened(hub_data(lists, caption_column="words")).captions() == [["a", "b"], ["c"], [""]]
    columns = parquet_folder(tmp_path / "columns", 3, long=["a", None, "c"])
    found = opened(hub_data(columns, caption_column=["text", "long"])).captions()
    assert found == [["caption 0", "a"], ["caption 1"], ["caption 2", "c"]]


def test_a_template_names_other_columns(tmp_path):
    folder = parquet_folder(tmp_path / "set", 2, artist=["Ann", "Bo"])
    template = {"caption_template": "{caption} by {artist}", "caption_prefix": "a drawing: "}
    assert said(opened(hub_data(folder, **template)))[1] == "a drawing: caption 1 by Bo"
    with pytest.raises(UserError, match=r"\{painter\}.*artist"):
        opened(hub_data(folder, caption_template="{caption} by {painter}"))


def test_what_was_found_out_is_kept(tmp_path, monkeypatch):
    folder = parquet_folder(tmp_path / "set", 3)
    first = opened(hub_data(folder), tmp_path / "cache")
    monkeypatch.setattr("ldm.data.images.examine", None)  # looking again would fail
    again = opened(hub_data(folder), tmp_path / "cache")
    assert again.fingerprint() == first.fingerprint()
    assert again.sizes().tolist() == first.sizes().tolist() == [[8, 8]] * 3 and not any(again.index.faults)


def test_pictures_inside_a_zip(tmp_path):
    picture_folder(tmp_path / "src", ["a.png", "b.png"])
    shutil.make_archive(str(tmp_path / "set" / "train"), "zip", tmp_path / "src")
    source = opened(hub_data(tmp_path / "set"))
    assert pairs(source) == expected(2)
    assert len(source.fingerprint()) == 64


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data.path=.*/nothing: there is no such folder"):
        opened(hub_data(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"data.path=./nothing: there is no such folder \(seen from /"):
        opened(hub_data("./nothing"))


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="is a file; name the folder that holds it"):
        opened(hub_data(tmp_path / "a.parquet"))


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="cannot be opened"):
        opened(hub_data(tmp_path))


@pytest.mark.parametrize("key", ["image_column", "caption_column"])
def test_a_missing_column_names_the_columns(tmp_path, key):
    folder = parquet_folder(tmp_path / "set")
    with pytest.raises(UserError, match=rf"has no column 'nope' \(data.{key}\); it has: image, text"):
        opened(hub_data(folder, **{key: "nope"}))


def test_a_column_that_holds_no_pictures(tmp_path):
    folder = parquet_folder(tmp_path / "set", 2, n=[1, 2])
    with pytest.raises(UserError, match=r"column 'n' \(data.image_column\) holds no pictures but Value\('int64'\)"):
        opened(hub_data(folder, image_column="n"))
    with pytest.raises(UserError, match="are both 'text'"):
        opened(hub_data(folder, image_column="text"))


@pytest.mark.parametrize("words", [[1, 2], [[1], [2]], [{"a": 1}, {"a": 2}]])
def test_captions_that_are_no_text_name_the_row(tmp_path, words):
    folder = parquet_folder(tmp_path / "set", 2, words=words)
    with pytest.raises(UserError, match=r"row 0: the caption in column 'words' is .*, not text"):
        opened(hub_data(folder, caption_column="words"))


def test_a_missing_split(tmp_path):
    with pytest.raises(UserError, match=r'data.split=nope.*Unknown split "nope".*train'):
        opened(hub_data(parquet_folder(tmp_path / "set"), split="nope"))


def test_damaged_pictures_are_known_by_their_row(tmp_path):
    images = [png(), b"", None, b"<html>", png()[:40]]
    source = opened(hub_data(parquet_folder(tmp_path / "set", images=images)))
    assert source[0]["captions"] == ["caption 0"]
    reasons = ("^$", "empty", "there is no picture", "HTML", "picture")
    for row, (fault, reason) in enumerate(zip(source.index.faults, reasons, strict=True)):
        assert re.search(reason, fault) and source.index.names[row].endswith(f"set, row {row}")
    for row in range(1, 5):
        with pytest.raises(UserError, match=rf"set, row {row}: "):
            source[row]


def test_pictures_that_lie_beside_the_set_and_vanish(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a.picture").write_bytes(png())
    table = datasets.Dataset.from_dict(
        {"image": [str(folder / "a.picture"), str(folder / "b.picture")], "text": ["a", "b"]}
    )
    table.cast_column("image", datasets.Image()).to_parquet(folder / "train.parquet", batch_size=1)
    source = opened(hub_data(folder))
    assert source.index.faults[0] == "" and "cannot be read" in source.index.faults[1]


@pytest.mark.parametrize("chain", ["", "file://", "local://", "zip://a.png::", "zip://a.png::file://", "./"])
def test_a_row_brings_no_other_files_of_this_machine(tmp_path, monkeypatch, chain):
    picture_folder(tmp_path / "src", ["a.png"])
    private = Path(shutil.make_archive(str(tmp_path / "private"), "zip", tmp_path / "src"))
    if not chain.startswith("zip"):
        private = tmp_path / "src" / "a.png"
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "set"
    folder.mkdir()
    elsewhere = [f"{folder}/../{private.relative_to(tmp_path)}", str(private)]
    rows = {"image": [chain + name.replace(f"{tmp_path}/" if chain == "./" else "\0", "") for name in elsewhere]}
    table = datasets.Dataset.from_dict({**rows, "text": ["a", "b"]})
    table.cast_column("image", datasets.Image()).to_parquet(folder / "train.parquet", batch_size=1)
    source = opened(hub_data(folder))
    assert all("which is neither in the set's folder nor" in fault for fault in source.index.faults)


@pytest.mark.parametrize("path", ["reach-vb/pokemon-blip-captions", "pokemon"])
def test_a_hub_set_out_of_reach_says_how_to_mend_it(path):
    code = (
        "from ldm.config import HubData; from ldm.data.hub import HubSource; from ldm.errors import UserError\n"
        "import sys\n"
        "try: HubSource(HubData(**eval(sys.argv[1])), None, None)\n"
        "except UserError as error: print(error)\n"
    )
    root = Path(__file__).parents[2]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root / "src")}
    values = repr(hub_data(path).model_dump())
    run = subprocess.run([sys.executable, "-c", code, values], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    message = run.stdout.strip().splitlines()[-1]
    assert message.startswith(f"data.path={path} (data.split=train) cannot be opened: ")
    assert "name a mirror with data.path=<other/id>, or a local folder with data=folder data.path=./folder" in message


def test_fingerprint_follows_pictures_captions_and_order(tmp_path):
    def fingerprint(name, images=(1, 2), texts=("a", "b")):
        folder = parquet_folder(tmp_path / name, images=[png((i, 0, 0)) for i in images], text=list(texts))
        return opened(hub_data(folder)).fingerprint()

    first = fingerprint("first")
    assert fingerprint("same, elsewhere") == first
    others = [fingerprint("picture", (1, 3)), fingerprint("caption", texts=("a", "c")), fingerprint("order", (2, 1))]
    others += [fingerprint("more", (1, 2, 3), "abc"), fingerprint("moved", texts=("ab", ""))]
    assert len({first, *others}) == 6


def test_fingerprint_knows_where_a_picture_ends_and_its_caption_begins(tmp_path):
    one = parquet_folder(tmp_path / "one", images=[b"ab"], text=["c"])
    other = parquet_folder(tmp_path / "other", images=[b"a"], text=["bc"])
    assert opened(hub_data(one)).fingerprint() != opened(hub_data(other)).fingerprint()


def test_a_caption_of_damaged_bytes_is_told(tmp_path):
    import pyarrow.parquet as pq

    path = parquet_folder(tmp_path / "set", 3) / "train.parquet"
    pq.write_table(pq.read_table(path), path, compression="NONE", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"caption 1", b"caption\xff1"))
    with pytest.raises(UserError, match="row 1 or one after it cannot be read"):
        opened(hub_data(tmp_path / "set"))
