import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from ldm.config import CustomData, HubData, ShapesData, Target
from ldm.data.shapes import Shapes
from ldm.data.sources import HubSource, Subset, open_sources
from ldm.errors import UserError
from tiny import Pixels

COMMON = {"resolution": 32, "batch_size": 4, "num_workers": 0, "cache": False, "num_val": 1}
NAMES = ["a.png", "my picture test.png", "x-train.png", "validation.png", "b c.PNG", "é.png"]


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory, monkeypatch):
    """Keep `datasets` from the user's cache and from its progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()


def hub_data(path, **options) -> HubData:
    names = {"subset": None, "split": "train", "revision": None, "image_column": "image", "caption_column": "text"}
    return HubData(**{**COMMON, "kind": "hub", "path": str(path), **names, **options})


def png(color=(1, 2, 3)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(file, "PNG")
    return file.getvalue()


def picture_folder(folder: Path, names=NAMES, metadata="jsonl") -> Path:
    """Write pictures, of which number i has red i, and their captions."""
    rows = [{"file_name": name, "text": f"caption {i}"} for i, name in enumerate(names)]
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png((i, 0, 0)))
    if metadata == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif metadata == "csv":
        with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
    return folder


def parquet_folder(folder: Path, num=5, name="train.parquet", images=None, **columns) -> Path:
    images = [png((i, 0, 0)) for i in range(num)] if images is None else images
    rows = {
        "image": [image if image is None else {"bytes": image, "path": None} for image in images],
        "text": [f"caption {i}" for i in range(len(images))],
        **columns,
    }
    folder.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_dict(rows)
    table.cast_column("image", datasets.Image()).to_parquet(folder / name)
    return folder


def pairs(source) -> set[tuple[int, str]]:
    return {(int(row["image"][0, 0, 0]), row["caption"]) for row in (source[i] for i in range(len(source)))}


def expected(num) -> set[tuple[int, str]]:
    return {(i, f"caption {i}") for i in range(num)}


# ------------------------------------------------------------------------------------------------ what can be read


@pytest.mark.parametrize("metadata", ["jsonl", "csv"])
def test_a_picture_folder_is_whole_whatever_its_files_are_called(tmp_path, metadata):
    source = HubSource(hub_data(picture_folder(tmp_path / "set", metadata=metadata)))
    assert len(source) == len(NAMES)
    assert pairs(source) == expected(len(NAMES))
    assert sorted(source.captions()) == sorted(f"caption {i}" for i in range(len(NAMES)))


def test_captions_are_those_of_their_pictures(tmp_path):
    source = HubSource(hub_data(picture_folder(tmp_path / "set", [f"{i} train.png" for i in (3, 1, 2)])))
    assert pairs(source) == expected(3)
    assert [source[i]["caption"] for i in range(3)] == list(source.captions())


@pytest.mark.parametrize("card", ["# My pictures\n", "---\nlicense: mit\n---\n# My pictures\n"])
def test_a_readme_does_not_let_file_names_cut_the_set(tmp_path, card):
    folder = picture_folder(tmp_path / "set")
    (folder / "README.md").write_text(card)
    assert len(HubSource(hub_data(folder))) == len(NAMES)


def test_a_card_that_names_its_files_is_obeyed(tmp_path):
    folder = picture_folder(tmp_path / "set", ["one/a.png", "one/b.png", "two/c.png"], metadata=None)
    for name, num in (("one", 2), ("two", 1)):
        rows = [{"file_name": f"{'abc'[i if name == 'one' else 2]}.png", "text": f"{name} {i}"} for i in range(num)]
        (folder / name / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: two/*\n---\n"
    (folder / "README.md").write_text(card)
    assert list(HubSource(hub_data(folder)).captions()) == ["two 0"]


@pytest.mark.parametrize("name", ["a [1].png", "b*.png", "c?.png", "50%.png", "x#y.png", "{z}.png", "q&a=1.png"])
def test_signs_in_file_names_are_no_patterns(tmp_path, name):
    assert pairs(HubSource(hub_data(picture_folder(tmp_path / "set", ["plain.png", name])))) == expected(2)


def test_signs_in_the_folders_name_are_no_patterns(tmp_path):
    assert len(HubSource(hub_data(picture_folder(tmp_path / "set [5]")))) == len(NAMES)


def test_other_files_and_hidden_ones_are_passed_over(tmp_path):
    folder = picture_folder(tmp_path / "set", ["a.png", "b.png", "deep/er/c.png"])
    (folder / "notes.txt").write_text("hello")
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / ".cache").mkdir()
    for hidden in (".cache/z.png", "._a.png"):
        (folder / hidden).write_bytes(png())
    assert pairs(HubSource(hub_data(folder))) == expected(3)


def test_folders_named_as_splits_are_splits(tmp_path):
    picture_folder(tmp_path / "set" / "train", ["a.png", "b.png"])
    picture_folder(tmp_path / "set" / "test", ["c.png"])
    assert len(HubSource(hub_data(tmp_path / "set"))) == 2
    assert len(HubSource(hub_data(tmp_path / "set", split="test"))) == 1
    with pytest.raises(UserError, match=r"has no split 'val' .*it has: train, test"):
        HubSource(hub_data(tmp_path / "set", split="val"))


def test_local_parquet_written_by_datasets(tmp_path):
    source = HubSource(hub_data(parquet_folder(tmp_path / "set", name="pictures.parquet")))
    assert pairs(source) == expected(5)
    assert list(source.captions()) == [f"caption {i}" for i in range(5)]


def test_column_names_are_config(tmp_path):
    folder = parquet_folder(tmp_path / "set", 2, words=["one", "two"], n=[1, 2])
    assert list(HubSource(hub_data(folder, caption_column="words")).captions()) == ["one", "two"]


def test_pictures_inside_a_zip(tmp_path):
    picture_folder(tmp_path / "src", ["a.png", "b.png"])
    shutil.make_archive(str(tmp_path / "set" / "train"), "zip", tmp_path / "src")
    source = HubSource(hub_data(tmp_path / "set"))
    assert pairs(source) == expected(2)
    assert len(source.fingerprint()) == 64


def test_a_home_folder_and_a_relative_path(tmp_path, monkeypatch):
    picture_folder(tmp_path / "set", ["a.png"])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("~/set", "./set", "set"):
        assert len(HubSource(hub_data(path))) == 1


# -------------------------------------------------------------------------------------------------------- refusals


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"data.path=.*/nothing: there is no such folder"):
        HubSource(hub_data(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"data.path=./nothing: there is no such folder \(seen from /"):
        HubSource(hub_data("./nothing"))


def test_a_file_is_not_a_folder(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="is a file; name the folder that holds it"):
        HubSource(hub_data(tmp_path / "a.parquet"))


def test_an_empty_folder(tmp_path):
    with pytest.raises(UserError, match="cannot be opened"):
        HubSource(hub_data(tmp_path))


@pytest.mark.parametrize("key", ["image_column", "caption_column"])
def test_a_missing_column_names_the_columns(tmp_path, key):
    folder = parquet_folder(tmp_path / "set")
    with pytest.raises(UserError, match=rf"has no column 'nope' \(data.{key}\); it has: image, text"):
        HubSource(hub_data(folder, **{key: "nope"}))


def test_a_folder_without_captions(tmp_path):
    with pytest.raises(UserError, match=r"has no column 'text'.*it has: image"):
        HubSource(hub_data(picture_folder(tmp_path / "set", metadata=None)))


def test_a_column_that_holds_no_pictures(tmp_path):
    folder = parquet_folder(tmp_path / "set", 2, n=[1, 2])
    with pytest.raises(UserError, match=r"column 'n' \(data.image_column\) holds no pictures but Value\('int64'\)"):
        HubSource(hub_data(folder, image_column="n"))
    with pytest.raises(UserError, match="are both 'text'"):
        HubSource(hub_data(folder, image_column="text"))


@pytest.mark.parametrize("words", [[1, 2], [None, "b"], [["a", "b"], ["c"]]])
def test_captions_that_are_no_text_name_the_row(tmp_path, words):
    source = HubSource(hub_data(parquet_folder(tmp_path / "set", 2, words=words), caption_column="words"))
    with pytest.raises(UserError, match=r"row 0: the caption in column 'words' is .*, not text"):
        source.captions()
    with pytest.raises(UserError, match="row 0"):
        source[0]


def test_a_missing_split(tmp_path):
    with pytest.raises(UserError, match=r'data.split=nope.*Unknown split "nope".*train'):
        HubSource(hub_data(parquet_folder(tmp_path / "set"), split="nope"))


def test_damaged_metadata(tmp_path):
    folder = picture_folder(tmp_path / "set")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"')
    with pytest.raises(UserError, match="cannot be opened"):
        HubSource(hub_data(folder))


def test_damaged_pictures_name_their_row(tmp_path):
    images = [png(), b"", None, b"<html>", png()[:40]]
    source = HubSource(hub_data(parquet_folder(tmp_path / "set", images=images)))
    assert source[0]["caption"] == "caption 0"
    for row, reason in ((1, "empty"), (2, "there is no picture"), (3, "no known format"), (4, "picture")):
        with pytest.raises(UserError, match=rf"set, row {row}.*{reason}"):
            source[row]


def test_a_zero_byte_and_a_vanished_file_are_named(tmp_path):
    folder = picture_folder(tmp_path / "set", ["a.png", "b.png"])
    (folder / "a.png").write_bytes(b"")
    source = HubSource(hub_data(folder))
    with pytest.raises(UserError, match=r"row 0 \(.*a.png\): not a picture: empty"):
        source[0]
    (folder / "b.png").unlink()
    for read in (lambda: source[1], source.fingerprint):
        with pytest.raises(UserError, match=r"row 1: the picture cannot be read: .*b.png"):
            read()


@pytest.mark.parametrize("path", ["reach-vb/pokemon-blip-captions", "pokemon"])
def test_a_hub_set_out_of_reach_says_how_to_mend_it(path):
    code = (
        "from ldm.config import HubData; from ldm.data.sources import HubSource; from ldm.errors import UserError\n"
        "import sys\n"
        "try: HubSource(HubData(**eval(sys.argv[1])))\n"
        "except UserError as error: print(error)\n"
    )
    root = Path(__file__).parents[2]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root / "src")}
    values = repr(hub_data(path).model_dump())
    run = subprocess.run([sys.executable, "-c", code, values], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    message = run.stdout.strip().splitlines()[-1]
    assert message.startswith(f"data.path={path} (data.split=train) cannot be opened: ")
    assert "name a mirror with data.path=<other/id>, or a local folder with data.path=./folder" in message


# ------------------------------------------------------------------------------------- fingerprints and both splits


def test_fingerprint_follows_pictures_captions_and_order(tmp_path):
    def fingerprint(name, images=(1, 2), texts=("a", "b")):
        folder = parquet_folder(tmp_path / name, images=[png((i, 0, 0)) for i in images], text=list(texts))
        return HubSource(hub_data(folder)).fingerprint()

    first = fingerprint("first")
    assert fingerprint("same, elsewhere") == first
    others = [fingerprint("picture", (1, 3)), fingerprint("caption", texts=("a", "c")), fingerprint("order", (2, 1))]
    others += [fingerprint("more", (1, 2, 3), "abc"), fingerprint("moved", texts=("ab", ""))]
    assert len({first, *others}) == 6


def test_fingerprint_knows_where_a_picture_ends_and_its_caption_begins(tmp_path):
    one = parquet_folder(tmp_path / "one", images=[b"ab"], text=["c"])
    other = parquet_folder(tmp_path / "other", images=[b"a"], text=["bc"])
    assert HubSource(hub_data(one)).fingerprint() != HubSource(hub_data(other)).fingerprint()


def test_fingerprint_of_a_folder_follows_its_files(tmp_path):
    folder = picture_folder(tmp_path / "set", ["a.png", "b.png"])
    before = HubSource(hub_data(folder)).fingerprint()
    (folder / "a.png").write_bytes(png((9, 9, 9)))
    assert HubSource(hub_data(folder)).fingerprint() != before


def test_training_and_validation_pictures_are_the_whole_set_once(tmp_path):
    data = hub_data(parquet_folder(tmp_path / "set", 20), num_val=6)
    train, val = open_sources(data)
    assert (len(train), len(val)) == (14, 6)
    assert pairs(train) | pairs(val) == expected(20) and not pairs(train) & pairs(val)
    assert [train[i]["caption"] for i in range(14)] == list(train.captions())
    again, _ = open_sources(data)
    assert list(again.captions()) == list(train.captions())
    assert again.fingerprint() == train.fingerprint() != val.fingerprint()


def test_validation_may_not_take_everything(tmp_path):
    with pytest.raises(UserError, match=r"the set has 5 pictures, data.num_val=5 leaves none to train on"):
        open_sources(hub_data(parquet_folder(tmp_path / "set", 5), num_val=5))


def test_shapes_come_in_disjoint_splits():
    data = ShapesData(**{**COMMON, "num_val": 3}, kind="shapes", objects=1, num_train=7, seed=4)
    train, val = open_sources(data)
    assert isinstance(train, Shapes) and isinstance(val, Shapes)
    assert (len(train), train.split, train.seed, train.resolution) == (7, "train", 4, 32)
    assert (len(val), val.split, val.seed) == (3, "val", 4)
    assert train.fingerprint() != val.fingerprint()


def test_a_source_of_the_users_own():
    data = CustomData(**COMMON, kind="custom", source=Target(_target_="tiny.Pixels", num=5, side=8))
    train, val = open_sources(data)
    assert isinstance(train, Subset) and isinstance(train.source, Pixels)
    assert (len(train), len(val)) == (4, 1)
    assert train[0]["image"].shape == (8, 8, 3)


def test_subset_takes_what_its_indices_say():
    whole = Pixels(6)
    part = Subset(whole, np.array([5, 0, 3]))
    assert list(part.captions()) == [whole.texts[i] for i in (5, 0, 3)]
    assert np.array_equal(part[1]["image"], whole.pixels[0])
    assert part.fingerprint() not in (whole.fingerprint(), Subset(whole, np.array([5, 3, 0])).fingerprint())
