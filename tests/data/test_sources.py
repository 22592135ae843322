import json
import os
from itertools import islice

import datasets
import numpy as np
import pytest
import torch

from ldm.config import CustomData, MixData, ShapesData, Target
from ldm.data.images import decode
from ldm.data.order import EndlessBatches
from ldm.data.pictures import Pictures
from ldm.data.shapes import Shapes
from ldm.data.sources import Subset, content, known, open_source, open_sources, training_order
from ldm.errors import UserError
from sets import (
    FEEDING,
    NAMES,
    expected,
    folder_data,
    hub_data,
    pairs,
    parquet_folder,
    picture_folder,
    png,
    pngs,
    shard_folder,
    shards_data,
    sidecar_folder,
    texts,
)
from tiny import Pixels


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path_factory, monkeypatch):
    """Keep `datasets` from the user's cache and from its progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()


def opened(section, cache=None):
    return open_source(section, decode, cache)


def said(source) -> list[str]:
    return [text for texts in source.captions() for text in texts]


FORMS = ("parquet", "metadata", "sidecars", "shards", "folder as hub")


def written(form, folder, images, captions):
    """Write a set in one of its forms; return the config that opens it."""
    if form == "parquet":
        return hub_data(parquet_folder(folder, images=images, text=captions), num_val=3)
    if form == "shards":
        return shards_data(shard_folder(folder, images, captions), num_val=3)
    sidecar_folder(folder, images, captions)
    if form != "sidecars":
        rows = [{"file_name": f"{i:04d}.png", "text": caption} for i, caption in enumerate(captions)]
        for text in folder.glob("*.txt"):
            text.unlink()
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (hub_data if form == "folder as hub" else folder_data)(folder, num_val=3)


def test_every_form_gives_the_same_training_batches(tmp_path):
    images = [png((i, 0, 0), (8 + i % 3, 8)) for i in range(14)]
    drawn = {}
    for form in FORMS:
        train, val = open_sources(written(form, tmp_path / form, images, texts(14)), cache=tmp_path / "cache")
        pictures = Pictures(train, 8, seed=5, crop="random", flip=True)
        batches = islice(EndlessBatches(training_order(train, 5), batch_size=4), 8)
        drawn[form] = [pictures.__getitems__(picks) for picks in batches], said(val)
    first, val = drawn["parquet"]
    assert len(set(val)) == 3 and len({text for batch in first for text in batch["caption"]}) == 11
    for form in FORMS:
        assert drawn[form][1] == val
        for mine, theirs in zip(drawn[form][0], first, strict=True):
            assert torch.equal(mine["image"], theirs["image"]) and mine["caption"] == theirs["caption"]


@pytest.mark.parametrize("form", FORMS)
def test_broken_pictures_are_left_out_and_listed(form, tmp_path, capsys):
    images = pngs(20)
    images[4], images[9] = b"", images[9][:40]
    data = written(form, tmp_path / "set", images, texts(20))
    report = tmp_path / "run" / "quarantine.txt"
    with pytest.raises(
        UserError, match=r"2 of 20 pictures \(10.0%\) cannot be used.*data.max_bad=0.01 allows 1.0%"
    ) as told:
        open_sources(data, report=report)
    assert str(report) in str(told.value) and len(report.read_text().splitlines()) == 2
    report.unlink()
    train, val = open_sources(data.model_copy(update={"max_bad": 0.1}), report=report)
    assert pairs(train) | pairs(val) == expected(20) - {(4, "caption 4"), (9, "caption 9")}
    lines = report.read_text().splitlines()
    assert len(lines) == 2 and all(line.count("\t") == 1 for line in lines) and "empty" in lines[0]
    assert "2 of 20 pictures (10.0%) cannot be used and are left out, listed in" in capsys.readouterr().out
    index = known(train)
    assert len(index.names) == len(train) == len(index.digests) and not any(index.faults)


@pytest.mark.parametrize("form", FORMS)
def test_too_many_empty_captions_end_the_run(form, tmp_path):
    captions = ["" if i in (3, 7) else f"caption {i}" for i in range(20)]
    data = written(form, tmp_path / "set", pngs(20), captions)
    with pytest.raises(UserError, match=r"2 of 20 pictures \(10.0%\) have no caption, such as .*3.*, .*7"):
        open_sources(data)
    train, _ = open_sources(data.model_copy(update={"max_bad": 0.1}))
    assert "" in said(train)


@pytest.mark.parametrize("form", ["shards", "sidecars"])
def test_what_was_changed_behind_the_back_of_its_times_is_seen(form, tmp_path):
    images = [png((i, 0, 0), suffix="BMP") for i in range(12)]  # all of one size
    data = written(form, tmp_path / "set", images[:6], texts(6))
    files = [path for path in sorted((tmp_path / "set").iterdir()) if path.suffix != ".txt"]
    before = {path: path.stat() for path in files}
    first, _ = open_sources(data, cache=tmp_path / "cache")
    first[0]
    written(form, tmp_path / "set", images[6:], texts(6))
    for path, status in before.items():
        assert path.stat().st_size == status.st_size
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as copying with `cp -p` leaves it
    with pytest.raises(UserError, match=r"has changed|has been changed"):
        [first[i] for i in range(3)]
    again, _ = open_sources(data, cache=tmp_path / "cache")
    assert again.fingerprint() != first.fingerprint() and content(again) != content(first)
    assert {red for red, _ in pairs(again)} <= set(range(6, 12))


def test_pictures_beside_a_parquet_file_are_looked_at_again(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    names = [folder / f"{i}.picture" for i in range(4)]  # `datasets` would take .png for a set of pictures
    for i, name in enumerate(names):
        name.write_bytes(png((i, 0, 0)))
    rows = {"image": list(map(str, names)), "text": texts(4)}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    table.to_parquet(folder / "train.parquet")
    first, _ = open_sources(hub_data(folder), cache=tmp_path / "cache")
    names[2].write_bytes(png((9, 0, 0)))
    again, held_out = open_sources(hub_data(folder), cache=tmp_path / "cache")
    assert again.fingerprint() != first.fingerprint()
    assert {red for red, _ in pairs(again) | pairs(held_out)} == {0, 1, 3, 9}


def test_other_columns_are_not_decoded(tmp_path):
    masks = [{"bytes": b"no picture", "path": None}] * 3
    folder = parquet_folder(tmp_path / "set", 3)
    table = datasets.Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=str(tmp_path / "c"))
    table.add_column("mask", masks).cast_column("mask", datasets.Image()).to_parquet(folder / "train.parquet")
    assert pairs(opened(hub_data(folder))) == expected(3)


def test_a_set_that_is_whole_leaves_no_report(tmp_path):
    report = tmp_path / "quarantine.txt"
    report.write_text("of an earlier run\n")
    open_sources(hub_data(parquet_folder(tmp_path / "set")), report=report)
    assert not report.exists()


def mix(tmp_path, weights=(1.0, 3.0), **options):
    parquet_folder(tmp_path / "one", 10)
    picture_folder(tmp_path / "two", ["a.png", "b.png"])
    sections = [hub_data(tmp_path / "one"), folder_data(tmp_path / "two")]
    parts = {
        section.kind: {key: value for key, value in section.model_dump().items() if key not in FEEDING}
        | {"weight": weight}
        for section, weight in zip(sections, weights, strict=True)
    }
    return MixData(**{**FEEDING, **options, "kind": "mix", "sources": parts})


def test_a_mix_draws_by_its_weights(tmp_path):
    train, val = open_sources(mix(tmp_path))
    assert len(train) == 11 and len(val) == 1 and len(said(train)) == 11
    whole = train.source
    assert [whole.part_of(np.arange(12)).tolist().count(part) for part in (0, 1)] == [10, 2]
    assert np.array_equal(whole[10]["image"], whole.parts[1][0]["image"])
    assert len(known(train).names) == 11 == len(train.sizes())
    order = training_order(train, 0)
    picks = [index for batch in islice(EndlessBatches(order, 11), 20) for index, _ in batch]
    share = np.mean(whole.part_of(train.indices[picks]))
    assert share == pytest.approx(0.75, abs=0.05)


def test_a_mix_names_what_is_broken_in_any_part(tmp_path):
    data = mix(tmp_path)
    (tmp_path / "two" / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"(?s)1 of 12 pictures.*folder: b\.png: "):
        open_sources(data)


@pytest.mark.parametrize("metadata", ["jsonl", "csv"])
def test_a_picture_folder_is_whole_whatever_its_files_are_called(tmp_path, metadata):
    source = opened(hub_data(picture_folder(tmp_path / "set", metadata=metadata)))
    assert len(source) == len(NAMES)
    assert pairs(source) == expected(len(NAMES))
    assert sorted(said(source)) == texts(len(NAMES))


@pytest.mark.parametrize("card", ["# My pictures\n", "---\nlicense: mit\n---\n# My pictures\n"])
def test_a_readme_does_not_let_file_names_cut_the_set(tmp_path, card):
    folder = picture_folder(tmp_path / "set")
    (folder / "README.md").write_text(card)
    assert len(opened(hub_data(folder))) == len(NAMES)


def test_names_of_folders_are_splits_only_when_asked_for(tmp_path, capsys):
    picture_folder(tmp_path / "set" / "train", ["a.png", "b.png"])
    picture_folder(tmp_path / "set" / "test", ["c.png"])
    picture_folder(tmp_path / "set" / "car", ["d.png"])
    assert len(opened(hub_data(tmp_path / "set"))) == 4
    assert "train/ and test/ are taken together" in capsys.readouterr().out
    assert len(opened(hub_data(tmp_path / "set", split="test"))) == 1
    with pytest.raises(UserError, match=r"has no split 'val' .*it has car, test, train"):
        opened(hub_data(tmp_path / "set", split="val"))


def test_a_home_folder_and_a_relative_path(tmp_path, monkeypatch):
    picture_folder(tmp_path / "set", ["a.png"])
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("~/set", "./set", "set"):
        assert len(opened(hub_data(path))) == 1


def test_training_and_validation_pictures_are_the_whole_set_once(tmp_path):
    data = hub_data(parquet_folder(tmp_path / "set", 20), num_val=6)
    train, val = open_sources(data)
    assert (len(train), len(val)) == (14, 6)
    assert pairs(train) | pairs(val) == expected(20) and not pairs(train) & pairs(val)
    assert [list(train[i]["captions"]) for i in range(14)] == list(train.captions())
    again, _ = open_sources(data)
    assert said(again) == said(train)
    assert again.fingerprint() == train.fingerprint() != val.fingerprint()
    otherwise = [open_sources(data, channels=1), open_sources(data.model_copy(update={"background": (0, 0, 0)}))]
    assert len({train.fingerprint(), *(other.fingerprint() for other, _ in otherwise)}) == 3


def test_validation_may_not_take_everything(tmp_path):
    with pytest.raises(UserError, match=r"the set has 5 pictures, data.num_val=5 leaves none to train on"):
        open_sources(hub_data(parquet_folder(tmp_path / "set", 5), num_val=5))


def test_shapes_come_in_disjoint_splits():
    data = ShapesData(**{**FEEDING, "num_val": 3}, kind="shapes", objects=1, num_train=7, seed=4)
    train, val = open_sources(data)
    assert isinstance(train, Shapes) and isinstance(val, Shapes)
    assert (len(train), train.split, train.seed, train.resolution) == (7, "train", 4, 32)
    assert (len(val), val.split, val.seed) == (3, "val", 4)
    assert train.fingerprint() != val.fingerprint()


def test_a_source_of_the_users_own():
    data = CustomData(**FEEDING, kind="custom", source=Target(_target_="tiny.Pixels", num=5, side=8))
    train, val = open_sources(data)
    assert isinstance(train, Subset) and isinstance(train.source, Pixels)
    assert (len(train), len(val)) == (4, 1)
    assert train[0]["image"].shape == (8, 8, 3)
    for channels in (1, 4):
        train, _ = open_sources(data, channels)
        assert train[0]["image"].shape == (8, 8, channels)


def test_subset_takes_what_its_indices_say():
    whole = Pixels(6)
    part = Subset(whole, np.array([5, 0, 3]))
    assert said(part) == [whole.texts[i] for i in (5, 0, 3)]
    assert np.array_equal(part[1]["image"], whole.pixels[0])
    assert part.fingerprint() not in (whole.fingerprint(), Subset(whole, np.array([5, 3, 0])).fingerprint())
