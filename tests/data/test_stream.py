"""Streams: any number of shards, near or far, read exactly once by any ranks and workers; broken pictures give way."""

import gc
import io
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ldm.data import parquet, remote, stream
from ldm.data.images import decode
from ldm.data.order import ShardShuffle, StreamBatches
from ldm.data.stream import Stream, hold_out, open_stream
from ldm.errors import UserError

WORDING = {"caption_template": "{caption}", "caption_prefix": "", "caption_suffix": ""}
SIZES = [7, 0, 12, 5, 9, 1, 6, 10, 3, 8, 4]
NUM = sum(SIZES)


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 77)).save(file, "PNG")
    return file.getvalue()


def number_of(row: dict[str, Any]) -> int:
    """A sample's number, as the picture and all captions say."""
    red, green, _ = row["image"][0, 0].tolist()
    assert all(text.endswith(f"no. {red + 256 * green}") for text in row["captions"])
    return red + 256 * green


def write_tars(folder: Path, sizes: list[int], encode: Callable[[int], bytes] = picture) -> Path:
    folder.mkdir(parents=True)
    first = 0
    for number, size in enumerate(sizes):
        with tarfile.open(folder / f"{number:03}.tar", "w") as file:
            for i in range(first, first + size):
                for name, content in ((f"{i:05}.png", encode(i)), (f"{i:05}.txt", f"no. {i}".encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
        first += size
    return folder


def write_parquet(folder: Path, sizes: list[int], encode: Callable[[int], bytes] = picture) -> Path:
    folder.mkdir(parents=True)
    first = 0
    for number, size in enumerate(sizes):
        rows = range(first, first + size)
        images = pa.array(
            [{"bytes": encode(i), "path": None} for i in rows],
            pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        )
        columns = {"image": images, "text": pa.array([f"no. {i}" for i in rows], pa.string()), "junk": [1] * size}
        pq.write_table(pa.table(columns), folder / f"train-{number:03}.parquet", row_group_size=4)
        first += size
    return folder


def shards_config(path: Any, **changes: Any) -> Any:
    return SimpleNamespace(**({**WORDING, "kind": "shards", "path": str(path), "caption_key": "txt"} | changes))


def hub_config(path: Any, **changes: Any) -> Any:
    own = {"kind": "hub", "path": str(path), "subset": None, "split": "train", "revision": None}
    return SimpleNamespace(**({**WORDING, **own, "image_column": "image", "caption_column": "text"} | changes))


def opened(config: Any, cache: Path | None = None, max_bad: float = 0.01, report: Path | None = None) -> Stream:
    return open_stream(config, decode, cache, max_bad, report)


@pytest.fixture(autouse=True)
def _settings(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(remote.tempfile, "tempdir", None)
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield
    files.store.clear()


def upload(folder: Path) -> str:
    files = fsspec.filesystem("memory")
    for path in folder.iterdir():
        files.pipe(f"/set/{path.name}", path.read_bytes())
    return "memory://set"


@pytest.fixture(params=["tars", "far tars", "parquet", "far parquet"])
def config(request, tmp_path) -> Any:
    """The same samples in each form."""
    form = request.param
    folder = (write_tars if "tars" in form else write_parquet)(tmp_path / "set", SIZES)
    path = upload(folder) if "far" in form else folder
    return (shards_config if "tars" in form else hub_config)(path)


# ---------------------------------------------------------------------------------------------------------- every form


def test_every_sample_by_its_index(config, tmp_path):
    found = opened(config, tmp_path / "cache")
    assert len(found) == NUM == found.counts.sum()
    assert [number_of(found[i]) for i in range(NUM)] == list(range(NUM))
    assert found.captions() == [[f"no. {i}"] for i in range(NUM)]
    assert found.captions(limit=10) == [[f"no. {i}"] for i in range(10)]
    for index in (-1, NUM):
        with pytest.raises(IndexError):
            found[index]


class Picks(Dataset[Any]):
    def __init__(self, source: Stream) -> None:
        self.source = source

    def __getitems__(self, picks: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(number_of(self.source[index]), epoch) for index, epoch in picks]


def batches(
    source: Stream, num_workers: int, num: int, rank: int = 0, world_size: int = 1, start: int = 0
) -> list[Any]:
    order = StreamBatches(ShardShuffle(source.counts, seed=3, window=3), 6, rank, world_size, start)
    loader: Any = DataLoader(
        Picks(source), batch_sampler=order, num_workers=num_workers, collate_fn=lambda batch: batch
    )
    found = iter(loader)
    return [next(found) for _ in range(num)]


def test_batches_are_the_same_with_any_number_of_workers(config):
    found = opened(config)
    alone = batches(found, 0, 30)
    assert batches(found, 1, 30) == batches(found, 2, 30) == alone
    assert batches(found, 2, 10, start=20) == alone[20:]


def test_each_sample_once_an_epoch_over_ranks_and_workers(config):
    train, val = hold_out(opened(config), num_val=13)
    assert [number_of(val[i]) for i in range(13)] == list(range(NUM - 13, NUM))
    picks = [p for rank in range(2) for batch in batches(train, 2, 18, rank, 2) for p in batch]
    for epoch in range(2):
        assert sorted(number for number, turn in picks if turn == epoch) == list(range(NUM - 13))


def test_words_of_the_user(config):
    config.caption_prefix = "a sign: "
    assert opened(config)[5]["captions"] == ["a sign: no. 5"]
    config.caption_template = "{caption} ({nothing})"
    with pytest.raises(UserError, match=r"(no column|names).*nothing"):
        opened(config).captions()


def test_the_fingerprint(config, tmp_path):
    found = opened(config)
    assert found.fingerprint() == opened(config).fingerprint()
    train, val = hold_out(found, 13)
    other = opened(shards_config(write_tars(tmp_path / "other", SIZES[::-1])))
    assert len({s.fingerprint() for s in (found, train, val, other)}) == 4


def test_a_copy_by_pickle_reads_on(config):
    found = opened(config)
    assert number_of(found[8]) == 8
    assert number_of(pickle.loads(pickle.dumps(found))[9]) == 9
    _, val = hold_out(found, 5)
    assert number_of(pickle.loads(pickle.dumps(val))[0]) == NUM - 5


# ------------------------------------------------------------------------------------------------------ broken pictures


def broken(*numbers: int) -> Callable[[int], bytes]:
    return lambda i: b"<html>" if i in numbers else picture(i)


@pytest.mark.parametrize("write", [write_tars, write_parquet])
def test_the_next_good_one_takes_the_place_of_a_broken_one(tmp_path, write):
    folder = write(tmp_path / "set", [4, 4, 4], broken(1, 2, 7))
    make = shards_config if write is write_tars else hub_config
    report = tmp_path / "run" / "quarantine.txt"
    found = opened(make(folder), report=report)
    for _ in range(2):
        assert [number_of(found[i]) for i in range(12)] == [0, 3, 3, 3, 4, 5, 6, 4, 8, 9, 10, 11]
    lines = [line.split("\t") for line in report.read_text().splitlines()]
    assert len(lines) == 3 and all("not a" in reason for _, reason in lines)
    assert ("001.tar/00007.png" if write is write_tars else "train-001.parquet, row group 0, row 3") in lines[2][0]


def test_a_replacement_is_of_the_same_part(tmp_path):
    folder = write_tars(tmp_path / "set", [4, 6], broken(6, 9))
    train, val = hold_out(opened(shards_config(folder)), num_val=3)
    assert [number_of(train[i]) for i in range(7)] == [0, 1, 2, 3, 4, 5, 4]
    assert [number_of(val[i]) for i in range(3)] == [7, 8, 7]


def test_a_shard_of_broken_pictures_only(tmp_path):
    found = opened(shards_config(write_tars(tmp_path / "set", [2, 3], broken(2, 3, 4))))
    with pytest.raises(UserError, match=r"001\.tar: none of 3 pictures can be used: .*0000\d\.png"):
        found[3]


def test_too_many_broken_pictures_end_it(tmp_path):
    folder = write_tars(tmp_path / "set", [300], lambda i: b"" if i % 10 == 3 else picture(i % 99))
    report = tmp_path / "quarantine.txt"
    found = opened(shards_config(folder), max_bad=0.05, report=report)
    with pytest.raises(UserError, match=r"of 200 pictures read so far 20 cannot .*max_bad=0\.05 .*quarantine"):
        for i in range(300):
            found[i]
    assert len(report.read_text().splitlines()) == 20
    patient = opened(shards_config(folder), max_bad=0.11)
    assert all(patient[i] for i in range(300))


def test_too_many_without_caption_end_it(tmp_path):
    found = opened(shards_config(write_tars(tmp_path / "set", [300]), caption_key="caption"))
    assert found.captions(3) == [[""]] * 3
    with pytest.raises(UserError, match=r"of 200 pictures read so far 200 have no caption \(data\.caption_key"):
        for i in range(300):
            found[i]


# ------------------------------------------------------------------------------------------------------ tars, counted


def test_stated_sizes_save_the_listing(tmp_path, monkeypatch):
    folder = write_tars(tmp_path / "set", [3, 4])
    (folder / "sizes.json").write_text(json.dumps({"000.tar": 3, "001.tar": 4, "gone.tar": 5}))
    listed: list[Any] = []
    whole = stream.TarShard
    monkeypatch.setattr(stream, "TarShard", lambda path, *_, **__: listed.append(path) or whole(path, *_, **__))
    for path in (folder, upload(folder)):
        assert opened(shards_config(path)).counts.tolist() == [3, 4] and not listed
    (folder / "sizes.json").write_text('{"000.tar": 3}')
    assert opened(shards_config(folder)).counts.tolist() == [3, 4] and len(listed) == 1
    monkeypatch.chdir(folder)
    assert opened(shards_config("000.tar")).counts.tolist() == [3] and len(listed) == 1


def test_stated_sizes_that_are_wrong(tmp_path):
    folder = write_tars(tmp_path / "set", [3])
    (folder / "sizes.json").write_text('{"000.tar": 4}')
    with pytest.raises(UserError, match=r"000\.tar holds 3 samples and not 4: .*sizes\.json"):
        opened(shards_config(folder))[0]
    for content in ("{", "[]", '{"000.tar": -1}', '{"000.tar": "3"}', '{"000.tar": true}'):
        (folder / "sizes.json").write_text(content)
        with pytest.raises(UserError, match=r"sizes\.json"):
            opened(shards_config(folder))


def test_what_was_counted_is_kept(config, tmp_path, monkeypatch):
    counts = opened(config, tmp_path / "cache").counts
    (kept,) = (tmp_path / "cache").glob("*.jsonl")
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(SIZES)
    kept.write_bytes(b"".join(lines[2:]) + lines[0][:-9])  # killed while it counted
    asked: list[str] = []
    for module, name in ((stream, "TarShard"), (parquet, "_rows")):
        was = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, was=was, **k: asked.append(str(a[0])) or was(*a, **k))
    assert np.array_equal(opened(config, tmp_path / "cache").counts, counts) and len(asked) == 2
    assert np.array_equal(opened(config, tmp_path / "cache").counts, counts) and len(asked) == 2


def test_a_shard_that_is_gone(tmp_path):
    found = opened(shards_config(write_tars(tmp_path / "set", [3, 3])))
    (tmp_path / "set" / "001.tar").unlink()
    assert number_of(found[2]) == 2
    with pytest.raises(UserError, match=r"001\.tar is no longer there"):
        found[3]


def test_a_shard_that_shrinks_ends_it_and_no_picture_is_replaced(tmp_path):
    folder = write_tars(tmp_path / "set", [3, 3])
    found = opened(shards_config(folder))
    assert number_of(found[3]) == 3
    os.truncate(folder / "001.tar", 2300)  # its first sample is whole
    with pytest.raises(UserError, match=r"001\.tar has changed since it was opened"):
        found[4]


# ------------------------------------------------------------------------------------------------------------ far away


def copies(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.copy") if path.is_file()]


def test_few_copies_are_kept_and_each_is_made_once_for_all_workers(tmp_path, monkeypatch):
    path = upload(write_tars(tmp_path / "set", [30] * 10))
    fsspec.filesystem("memory").pipe("/set/sizes.json", json.dumps({f"{i:03}.tar": 30 for i in range(10)}).encode())
    log = tmp_path / "log"
    copy_file = stream.copy_file

    def logged(url: str, part: Path) -> None:
        with log.open("a") as file:
            file.write(f"{url}\n")
        copy_file(url, part)

    monkeypatch.setattr(stream, "copy_file", logged)
    monkeypatch.setattr(stream, "WINDOW", 3)
    monkeypatch.setattr(remote, "ROOM", 0)
    found = opened(shards_config(path), tmp_path / "cache")
    assert len(batches(found, 2, 46)) == 46  # with those that are fetched ahead an epoch, of 50
    times = Counter(log.read_text().split())
    assert len(times) == 10 and set(times.values()) == {1}
    assert len(copies(tmp_path / "cache")) == 6


HELD: list[Stream] = []


def use_and_forget() -> None:
    HELD.pop()[5]
    gc.collect()


def test_copies_go_with_the_stream(config, tmp_path):
    HELD[:] = [opened(config, tmp_path / "cache")]
    HELD[0][0]
    local = config.kind == "shards" and "://" not in config.path
    assert bool(copies(tmp_path)) != local
    process = multiprocessing.get_context("fork").Process(target=use_and_forget)
    process.start()
    process.join()
    assert process.exitcode == 0 and bool(copies(tmp_path)) != local
    use_and_forget()
    assert not copies(tmp_path) and not [p for p in (tmp_path / "cache").iterdir() if "copies" in p.name and p.is_dir()]


def test_what_killed_processes_left_goes(tmp_path):
    kill = "import os; from pathlib import Path; from ldm.data.remote import Copies; c = Copies.temporary(Path('.'));"
    kill += "c.get('a', '1', lambda part: part.write_bytes(b'x')); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", kill], cwd=tmp_path, check=False)
    mine = remote.Copies(tmp_path / "mine")
    assert len(copies(tmp_path)) == 1
    living = remote.Copies.temporary(tmp_path)
    assert not copies(tmp_path)
    living.get("b", "1", lambda part: part.write_bytes(b"x"))
    second = remote.Copies.temporary(tmp_path)
    assert len(copies(tmp_path)) == 1 and second.folder != living.folder
    assert mine.get("b", "1", lambda part: part.write_bytes(b"y")).read_bytes() == b"y"
    assert mine.get("b", "2", lambda part: part.write_bytes(b"z")).read_bytes() == b"z"


def test_copies_that_are_removed_at_once_are_made_again(config, monkeypatch):
    monkeypatch.setattr(stream, "WINDOW", 1)
    found = opened(config)
    get, removed = remote.Copies.get, []

    def hasty(self: remote.Copies, *args: Any) -> Path:
        path = get(self, *args)
        if len(removed) % 3:
            path.unlink()
        removed.append(path)
        return path

    monkeypatch.setattr(remote.Copies, "get", hasty)
    assert [number_of(found[i]) for i in range(0, NUM, 5)] == list(range(0, NUM, 5))


def test_hiccups_of_the_network(config, monkeypatch):
    if "://" not in config.path:
        config.path = upload(Path(config.path))
    fsspec.filesystem("memory").pipe(
        "/set/sizes.json", json.dumps({f"{i:03}.tar": size for i, size in enumerate(SIZES)}).encode()
    )
    found = opened(config)
    reach, calls = remote.url_to_fs, []

    def flaky(url: str) -> Any:
        calls.append(url)
        if len(calls) % 3:
            raise ConnectionResetError("reset by peer")
        return reach(url)

    monkeypatch.setattr(remote, "url_to_fs", flaky)
    assert [number_of(found[i]) for i in (0, NUM - 1)] == [0, NUM - 1] and len(calls) == 6

    def slow(url: str) -> Any:
        raise TimeoutError("too slow")

    monkeypatch.setattr(remote, "url_to_fs", slow)
    with pytest.raises(UserError, match=r"set/.* cannot be (read|copied to .*): too slow"):
        found[NUM // 2]


def test_what_does_not_pass_is_not_tried_again(tmp_path):
    for error in (FileNotFoundError("x"), PermissionError("no"), OSError(28, "No space left on device")):
        calls = []

        def fail(error: Exception = error, calls: list[int] = calls) -> None:
            calls.append(1)
            raise error

        with pytest.raises(UserError, match=r"the thing: "):
            remote.patiently(fail, "the thing")
        assert len(calls) == 1


# --------------------------------------------------------------------------------------------------------- parquet sets


def test_several_caption_columns_and_lists(tmp_path):
    images = [{"bytes": picture(i), "path": None} for i in range(3)]
    table = pa.table({"picture": images, "a": ["x", None, "z"], "b": [["1", "2"], [], ["3"]], "by": ["A", "B", None]})
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set" / "0.parquet")
    config = hub_config(tmp_path / "set", image_column="picture", caption_column=["a", "b"])
    assert opened(config).captions() == [["x", "1", "2"], [""], ["z", "3"]]
    config.caption_template = "{caption} by {by}"
    assert opened(config)[0]["captions"] == ["x by A", "1 by A", "2 by A"]


def test_columns_that_are_not_there(tmp_path):
    folder = write_parquet(tmp_path / "set", [3])
    for changes, told in [
        ({"image_column": "img"}, r"no column 'img' \(data\.image_column\); it has: image, text, junk"),
        ({"caption_column": ["text", "alt"]}, r"no column 'alt' \(data\.caption_column\)"),
        ({"caption_template": "{caption} {by}"}, r"no column 'by' \(data\.caption_template\)"),
    ]:
        with pytest.raises(UserError, match=told):
            opened(hub_config(folder, **changes))
    for config in (hub_config(folder, image_column="junk"), hub_config(folder, caption_column="junk")):
        with pytest.raises(
            UserError, match=r"none of 3 pictures can be used: .*(no picture in column|is int, not text)"
        ):
            opened(config)[0]


def test_sets_that_are_no_parquet(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0.png").write_bytes(picture(0))
    with pytest.raises(UserError, match=r"streaming=true reads parquet files.*data=folder or data=shards"):
        opened(hub_config(tmp_path / "pictures"))
    with pytest.raises(UserError, match=r"has no split 'test' \(data\.split\); it has: train"):
        opened(hub_config(write_parquet(tmp_path / "set", [3]), split="test"))
    with pytest.raises(UserError, match=r"memory://nothing: there are no \.parquet files"):
        opened(hub_config("memory://nothing"))
    with pytest.raises(UserError, match=r"cannot be opened"):
        opened(hub_config(tmp_path / "nowhere"))
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "train-0.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"train-0\.parquet cannot be read as parquet"):
        opened(hub_config(bad))


def test_a_hub_set_that_is_no_parquet_names_the_copy_that_is(monkeypatch):
    import datasets

    builder = SimpleNamespace(config=SimpleNamespace(data_files={"train": ["hf://datasets/a/b@1/train.tar"]}))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    with pytest.raises(UserError, match=r"data\.revision=refs/convert/parquet"):
        opened(hub_config("a/b"))


def test_captions_are_read_without_pictures(tmp_path, monkeypatch):
    found = opened(hub_config(write_parquet(tmp_path / "set", [8])))
    read, asked = parquet.RowGroups._read, []
    monkeypatch.setattr(parquet.RowGroups, "_read", lambda *args: asked.append(args[2]) or read(*args))
    assert len(found.captions()) == 8 and asked == [["text"]] * 2 and not copies(tmp_path)


def test_what_was_counted_may_be_damaged_and_is_counted_again(config, tmp_path):
    counts = opened(config, tmp_path / "cache").counts
    (kept,) = (tmp_path / "cache").glob("*.jsonl")
    url, mark, _ = json.loads(kept.read_text().splitlines()[0])
    for found in ("null", '"7"', "-1", "1e3", str(2**70), "[-1]", '["x"]', f"[{2**70}]", "{}", "[" * 100_000):
        with kept.open("a") as file:
            file.write(f"[{json.dumps(url)}, {json.dumps(mark)}, {found}]\n")
    assert np.array_equal(opened(config, tmp_path / "cache").counts, counts)


def test_a_number_of_samples_that_no_shard_has(tmp_path):
    folder = write_tars(tmp_path / "set", [3])
    (folder / "sizes.json").write_text(json.dumps({"000.tar": 2**64}))
    with pytest.raises(UserError, match=r"sizes\.json: 000\.tar has 18446744073709551616 samples"):
        opened(shards_config(folder))


def test_damage_inside_of_a_row_group_is_told(tmp_path, monkeypatch):
    folder = write_parquet(tmp_path / "set", [4])
    path = folder / "train-000.parquet"
    pq.write_table(pq.read_table(path), path, compression="NONE", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"no. 2", b"no.\xff2"))
    found = opened(hub_config(folder), max_bad=1)
    assert len(found.captions()) == 3
    with pytest.raises(UserError, match="column 'text' cannot be read"):
        found.shards.open(0).captions(2)
    found.shards.counts = np.array([5])
    with pytest.raises(UserError, match="is damaged: it does not hold the 5 rows that it should"):
        found.shards.open_captions(0)
