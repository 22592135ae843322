"""Tar shards: found, listed, read by offset as webdataset reads them; whatever is wrong with one is said."""

import io
import json
import os
import pickle
import tarfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import braceexpand
import fsspec
import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from ldm.data import remote, shards, tar
from ldm.data.images import decode
from ldm.data.shards import TarSource, find_shards
from ldm.data.tar import TarShard, list_members
from ldm.errors import UserError


def picture(number: int, kind: str = "PNG") -> bytes:
    """A picture whose first pixel says its number."""
    file = io.BytesIO()
    Image.new("RGB", (12, 8), (number % 256, number // 256, 77)).save(file, kind)
    return file.getvalue()


def number_of(pixels: np.ndarray) -> int:
    return int(pixels[0, 0, 0]) + 256 * int(pixels[0, 0, 1])


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def samples(first: int, last: int) -> list[tuple[str, bytes]]:
    return [m for i in range(first, last) for m in ((f"{i:05}.png", picture(i)), (f"{i:05}.txt", f"no. {i}".encode()))]


def config(path: Any, **changes: Any) -> Any:
    wording = {"caption_template": "{caption}", "caption_prefix": "", "caption_suffix": ""}
    own = {"kind": "shards", "path": path if isinstance(path, list) else str(path), "caption_key": "txt"}
    return SimpleNamespace(**(wording | own | {"streaming": False} | changes))


def source(path: Any, cache: Path | None = None, **changes: Any) -> TarSource:
    return TarSource(config(path, **changes), decode, cache)


@pytest.fixture
def far():
    """An empty place behind URLs."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


# --------------------------------------------------------------------------------------------------------- finding them


def test_a_folder_a_pattern_braces_and_a_list(tmp_path, monkeypatch):
    for name in ("s-000.tar", "s-001.tar", "s-002.tar", "other.tar", "notes.txt", "sub/s-003.tar"):
        write_tar(tmp_path / name, [])
    monkeypatch.chdir(tmp_path)
    three = [str(tmp_path / f"s-00{i}.tar") for i in range(3)]
    assert find_shards(str(tmp_path)) == [str(tmp_path / "other.tar"), *three]
    assert find_shards(f"{tmp_path}/s-*.tar") == find_shards(f"{tmp_path}/s-{{000..002}}.tar") == three
    assert find_shards([three[2], f"{tmp_path}/s-{{000,001}}.tar", three[0]]) == three
    assert find_shards(f"{tmp_path}/**/s-*.tar") == [*three, str(tmp_path / "sub/s-003.tar")]
    assert find_shards("s-000.tar") == ["s-000.tar"]
    assert find_shards(f"file://{three[0]}") == three[:1]


def test_signs_of_patterns_in_names_that_are_there(tmp_path):
    folder = tmp_path / "a{1..3} [x]* é\n"
    path = write_tar(folder / "b{1,2}[0].tar", samples(0, 1))
    assert find_shards(str(folder)) == find_shards(str(path)) == [str(path)]
    assert len(source(folder)) == 1


def test_urls(far):
    for i in range(3):
        far.pipe(f"/set/{i}.tar", b"")
    urls = [f"memory:///set/{i}.tar" for i in range(3)]
    assert find_shards("memory://set") == find_shards("memory://set/*.tar") == urls
    assert find_shards("memory://set/{0..1}.tar") == ["memory://set/0.tar", "memory://set/1.tar"]


BRACES = r"[a-c/]{0,3}((\{\d{1,2}\.\.\d{1,2}\}|\{[a-c]{0,2}(,[a-c]{0,2}){1,2}\})[a-c]?){0,2}"


@settings(deadline=None)
@given(st.from_regex(BRACES, fullmatch=True))
def test_braces_are_those_of_a_shell(pattern):
    assert sorted(shards._expand(pattern)) == sorted(braceexpand.braceexpand(pattern))


def test_nothing_there(tmp_path, far, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", ())
    for path in (f"{tmp_path}/*.tar", str(tmp_path), "memory://nothing", "memory://nothing/*.tar", [str(tmp_path)]):
        with pytest.raises(UserError, match=r"data\.path=.*: there are no \.tar files"):
            find_shards(path)
    for path in (f"{tmp_path}/x.tar", f"{tmp_path}/{{0..1}}.tar", "memory://nothing/0.tar"):
        with pytest.raises(UserError, match="it is not there"):
            source(path)
    with pytest.raises(UserError, match="cannot be listed: Protocol not known"):
        find_shards("pipe://cat x")
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(UserError, match="gunzip them"):
        find_shards(str(tmp_path))


# --------------------------------------------------------------------------------------------------- as webdataset does


def test_the_same_samples_as_webdataset(tmp_path):
    rng = np.random.default_rng(0)
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"{shard}.tar")) as sink:
            for i in range(shard * 10, shard * 10 + 10):
                row = {"tags": ["a", f"t{i}"], "size": int(rng.integers(99))}
                sample = {"__key__": f"dir.v1/{i:04}", "json": row, "txt": f"picture {i}"}
                sink.write(sample | {"jpg" if i % 2 else "PNG": picture(i, "JPEG" if i % 2 else "PNG")})
    theirs = list(wds.WebDataset([str(tmp_path / "0.tar"), str(tmp_path / "1.tar")], shardshuffle=False))
    ours = source(tmp_path, caption_template="{caption} ({tags}, {size})")
    assert len(ours) == len(theirs) == 20
    for i, sample in enumerate(theirs):
        assert ours.read(i) == sample.get("jpg", sample.get("png"))
        row = json.loads(sample["json"])
        assert ours.captions()[i] == [f"{sample['txt'].decode()} ({', '.join(row['tags'])}, {row['size']})"]
    assert ours.index.names[11] == f"{tmp_path}/1.tar/dir.v1/0011.jpg"
    assert ours.sizes().tolist() == [[12, 8]] * 20
    assert [number_of(ours[i]["image"]) for i in range(0, 20, 2)] == list(range(0, 20, 2))


NAMES = [
    "a/b.c/d.jpg",
    "x.jpg",
    "x.txt",
    "no-dot",
    "__note__/x.jpg",
    "__meta__",
    "./e.jpg",
    "é ü/名.jpg",
    "f" * 200 + ".jpg",
]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_of_odd_names(tmp_path, form):
    names = [n for n in NAMES if form != tarfile.USTAR_FORMAT or len(n) < 100]
    path = write_tar(tmp_path / "0.tar", [(n, picture(3)) for n in names], form)
    theirs = [sample["__key__"] for sample in wds.WebDataset(str(path), shardshuffle=False)]
    shard = TarShard(path, "0.tar", config(path))
    assert [name.rsplit(".", 1)[0] for name in shard.names] == theirs


def test_names_that_are_no_utf8(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as file:
        for name, content in (("é.png", picture(0)), ("é.txt", b"e"), ("è.png", picture(1))):  # not one key
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    assert source(path, tmp_path / "cache").captions() == [["e"], [""]]


# ------------------------------------------------------------------------------------------------------------- captions


def captions_of(tmp_path: Path, members: list[tuple[str, bytes]], **changes: Any) -> list[list[str]]:
    path = write_tar(tmp_path / "0.tar", [("0.png", picture(0)), *members, ("1.png", picture(1)), ("1.txt", b"one"),
                                          ("1.json", b'{"text": "one", "by": "Ann"}')])  # fmt: skip
    return [list(texts) for texts in source(path, **changes).captions()]


def test_text_members(tmp_path):
    assert captions_of(tmp_path, [("0.txt", "\ufeffa red\nhouse ".encode())]) == [["a red house"], ["one"]]
    assert captions_of(tmp_path, [("0.TXT", b"zero")]) == [["zero"], ["one"]]
    assert captions_of(tmp_path, [("0.caption", b"zero")], caption_key="caption") == [["zero"], [""]]
    assert captions_of(tmp_path, []) == captions_of(tmp_path, [("0.txt", b" \n")]) == [[""], ["one"]]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("zero", ["zero"]),
        (["zero", "nil"], ["zero", "nil"]),
        (["zero", None, ""], ["zero"]),
        (None, [""]),
        ([], [""]),
    ],
)
def test_fields_of_json_members(tmp_path, value, expected):
    content = json.dumps({"text": value, "by": "Bob"}).encode()
    assert captions_of(tmp_path, [("0.json", content)], caption_key="json:text") == [expected, ["one"]]
    worded = {"caption_template": "{caption}, by {by}", "caption_prefix": "P ", "caption_suffix": "!"}
    found = captions_of(tmp_path, [("0.json", content)], caption_key="json:text", **worded)
    assert found == [[f"P {text}, by Bob!" if text else "" for text in expected], ["P one, by Ann!"]]


@pytest.mark.parametrize(
    ("name", "content", "key", "fault"),
    [
        ("0.txt", b"\xff\xfe\x00", "txt", "its caption is no UTF-8 text"),
        ("0.json", b"{", "json:text", "its .json cannot be read"),
        ("0.json", b"[" * 100_000, "json:text", "its .json cannot be read"),
        ("0.json", b"[1]", "json:text", "its .json holds no JSON object"),
        ("0.json", b'{"text": 7}', "json:text", "the caption is int, not text"),
    ],
)
def test_a_caption_that_cannot_be_read_is_a_fault(tmp_path, name, content, key, fault):
    path = write_tar(tmp_path / "0.tar", [("0.png", picture(0)), (name, content), ("1.png", picture(1)),
                                          ("1.txt", b"one"), ("1.json", b'{"text": "one"}')])  # fmt: skip
    found = source(path, caption_key=key)
    assert fault in found.index.faults[0] and found.index.faults[1] == ""
    assert found.captions() == [[""], ["one"]]


def test_no_caption_anywhere_names_what_there_is(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples(0, 2))
    with pytest.raises(UserError, match=r"caption_key=caption: no picture .* has such .* members \.png, \.txt"):
        source(path, caption_key="caption")
    for key in ("json", "json:", "txt:x"):
        with pytest.raises(UserError, match=r"caption_key=.*json:caption"):
            source(path, caption_key=key)


# ---------------------------------------------------------------------------------------------------- what can be wrong


def test_broken_and_missing_pictures_are_faults(tmp_path):
    members = [("0.png", picture(0)), ("0.txt", b"a"), ("1.txt", b"b"), ("2.png", b"<html>"), ("2.txt", b"c")]
    members += [("3.png", b""), ("3.txt", b"d"), ("4.cls", b"5"), ("5.left.png", picture(5))]
    found = source(write_tar(tmp_path / "0.tar", members))
    assert [bool(fault) for fault in found.index.faults] == [False, True, True, True, True, True]
    assert found.index.names[1] == f"{tmp_path}/0.tar/1" and "ends at the first dot" in found.index.faults[1]
    assert found.captions() == [["a"], ["b"], ["c"], ["d"], [""], [""]]
    with pytest.raises(UserError, match=r"0\.tar/2\.png: .*not a"):
        found[2]


def test_links_and_devices_are_not_followed_and_nothing_is_written(tmp_path, monkeypatch):
    (tmp_path / "secret.png").write_bytes(picture(9))
    path = tmp_path / "set" / "0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as file:
        for number, kind in enumerate(
            [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
        ):
            info = tarfile.TarInfo(f"{number}.png")
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            file.addfile(info)
        for name in ("/tmp/abs.png", "../../up.png", "a/../b.png"):
            info = tarfile.TarInfo(name)
            info.size = len(picture(1))
            file.addfile(info, io.BytesIO(picture(1)))
    monkeypatch.chdir(path.parent)
    before = sorted(tmp_path.rglob("*"))
    shard = TarShard(path, "0.tar", config(path))
    assert shard.names == ["/tmp/abs.png", "../../up.png", "a/../b.png"]
    assert all(shard.encoded(i) == picture(1) for i in range(3))
    assert sorted(tmp_path.rglob("*")) == before and not os.path.exists("/tmp/abs.png")


def test_members_that_are_apart_or_there_twice(tmp_path):
    apart = [("0.png", picture(0)), ("1.png", picture(1)), ("0.txt", b"a"), ("1.txt", b"b")]
    with pytest.raises(UserError, match=r"0\.tar: the members of 0 are not next to each other.*tar --sort=name"):
        source(write_tar(tmp_path / "0.tar", apart))
    for twice in ("0.png", "0.PNG"):
        with pytest.raises(UserError, match=r"0\.tar: 0\.(png|PNG) is there twice"):
            source(write_tar(tmp_path / "0.tar", [("0.png", picture(0)), (twice, picture(1))]))


@pytest.mark.parametrize(("kind", "tool"), [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")])
def test_compressed_tars_are_refused(tmp_path, kind, tool):
    with tarfile.open(tmp_path / "0.tar", f"w:{kind}") as file:
        file.addfile(tarfile.TarInfo("0.png"))
    with pytest.raises(UserError, match=rf"0\.tar is compressed.*{tool}"):
        source(tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>" * 200, b"\xff" * 5000, picture(1), b"a" * 100])
def test_what_is_no_tar(tmp_path, content):
    (tmp_path / "0.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"0\.tar is no tar file \(\d+ bytes\)"):
        source(tmp_path)


def test_empty_tars(tmp_path):
    write_tar(tmp_path / "0.tar", [])
    assert len(source(tmp_path)) == 0
    write_tar(tmp_path / "1.tar", samples(0, 2))
    write_tar(tmp_path / "2.tar", [])
    write_tar(tmp_path / "3.tar", samples(2, 3))
    found = source(tmp_path)
    assert [number_of(found[i]["image"]) for i in range(len(found))] == [0, 1, 2]


def test_a_tar_cut_anywhere_is_noticed(tmp_path):
    whole = write_tar(tmp_path / "0.tar", samples(0, 3)).read_bytes()
    members = list_members(io.BytesIO(whole), "t")
    end = max(offset + size for _, offset, size in members)
    end += -end % 512
    for length in range(1, len(whole), 37):
        if length >= end + 512:  # of the mark that ends a tar one block is enough
            assert list_members(io.BytesIO(whole[:length]), "t") == members
        else:
            with pytest.raises(UserError, match=r"t is (cut off or damaged at byte \d+ of|no tar file)"):
                list_members(io.BytesIO(whole[:length]), "t")


def test_joined_tars_are_not_read_in_part(tmp_path):
    joined = b"".join(write_tar(tmp_path / f"{i}.tar", samples(i, i + 1)).read_bytes() for i in range(2))
    (tmp_path / "joined.tar").write_bytes(joined)
    with pytest.raises(UserError, match="goes on after its end"):
        source(tmp_path / "joined.tar")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12_000), st.integers(0, 255)), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=8),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_flipped_bytes_are_told_or_harmless(flips, header, form):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as writer:
        for name in ("d/" * 60 + "a.png", "b.png"):
            info = tarfile.TarInfo(name)
            info.size = 700
            writer.addfile(info, io.BytesIO(bytes(700)))
    content = bytearray(file.getvalue())
    for place, value in header or flips:
        content[place % len(content)] = value
    if header:  # that says something else, in good order
        content[148:156] = b" " * 8
        content[148:156] = f"{sum(content[:512]):06o}\0 ".encode()
    try:
        members = list_members(io.BytesIO(bytes(content)), "t")
    except UserError:
        return
    assert all(0 <= offset <= offset + size <= len(content) for _, offset, size in members)


def test_a_member_of_negative_size_does_not_loop():
    info = tarfile.TarInfo("a.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + (-1024).to_bytes(2, "big", signed=True)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    with pytest.raises(UserError, match=r"damaged|no tar"):
        list_members(io.BytesIO(bytes(header) * 2 + bytes(10240)), "t")


# -------------------------------------------------------------------------------------------- what is kept, and reading


def test_a_shard_is_listed_once(tmp_path, monkeypatch):
    write_tar(tmp_path / "s" / "0.tar", samples(0, 3))
    cache = tmp_path / "cache"
    first = source(tmp_path / "s", cache)

    def fail(*_: Any) -> None:
        raise AssertionError("listed again")

    monkeypatch.setattr(tar, "list_members", fail)
    again = source(tmp_path / "s", cache)
    assert again.index.names == first.index.names and again.fingerprint() == first.fingerprint()
    monkeypatch.undo()
    write_tar(tmp_path / "s" / "0.tar", samples(4, 9))
    assert len(source(tmp_path / "s", cache)) == 5
    for kept in (cache / "shards").glob("*.members"):
        kept.write_bytes(kept.read_bytes()[:100])
    assert len(source(tmp_path / "s", cache)) == 5


def test_far_shards_are_copied_once(tmp_path, far, monkeypatch):
    for i in range(2):
        far.pipe(f"/set/{i}.tar", write_tar(tmp_path / f"{i}.tar", samples(i * 5, i * 5 + 5)).read_bytes())
    near = source(f"{tmp_path}/*.tar")
    ours = source("memory://set", tmp_path / "cache")
    assert [number_of(ours[i]["image"]) for i in range(10)] == list(range(10))
    assert ours.fingerprint() == near.fingerprint()
    assert ours.index.names[0] == "memory:///set/0.tar/00000.png"
    monkeypatch.setattr(shards, "copy_file", None)
    monkeypatch.setattr("ldm.data.images.examine", None)  # nor is a picture looked at again
    assert number_of(source("memory://set", tmp_path / "cache")[9]["image"]) == 9
    tar._opened.cache_clear()
    assert number_of(ours[9]["image"]) == 9  # to use a copy is not to change it
    monkeypatch.undo()
    assert number_of(source("memory://set")[9]["image"]) == 9  # without a cache, in a temporary folder


def test_copies_that_do_not_arrive(tmp_path, far, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    content = write_tar(tmp_path / "0.tar", samples(0, 5)).read_bytes()
    far.pipe("/set/0.tar", content)
    get, calls = type(far).get_file, []

    def flaky(self: Any, url: str, path: str, **_: Any) -> None:
        calls.append(url)
        if len(calls) == 1:
            raise ConnectionError("reset by peer")
        get(self, url, path)
        if len(calls) == 2:
            os.truncate(path, 1000)

    monkeypatch.setattr(type(far), "get_file", flaky)
    assert len(source("memory://set", tmp_path / "cache")) == 5 and len(calls) == 3
    monkeypatch.setattr(type(far), "get_file", lambda self, url, path, **_: (_ for _ in ()).throw(TimeoutError("slow")))
    with pytest.raises(UserError, match=r"memory:///set/0\.tar cannot be copied to .*: slow"):
        source("memory://set")


def test_workers_threads_and_pickle_read_the_same(tmp_path, monkeypatch):
    for i in range(6):
        write_tar(tmp_path / f"{i}.tar", samples(i * 5, i * 5 + 5))
    found = source(tmp_path)
    assert number_of(found[3]["image"]) == 3  # files are open before the fork
    loader: Any = DataLoader(found, batch_size=None, num_workers=2, sampler=list(range(30)) * 3)
    assert [number_of(row["image"]) for row in loader] == list(range(30)) * 3
    assert number_of(pickle.loads(pickle.dumps(found))[17]["image"]) == 17
    tar._opened.cache_clear()
    small: Any = tar.functools.lru_cache(maxsize=2)(tar._Handle)
    monkeypatch.setattr(tar, "_opened", lambda path, state: small(path))
    barrier = threading.Barrier(4)

    def read(seed: int) -> bool:
        barrier.wait()
        order = np.random.default_rng(seed).integers(0, 30, 200)
        return all(number_of(found[int(i)]["image"]) == i for i in order)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
    open_files = [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
    assert sum(str(tmp_path) in name for name in open_files) == 2


def test_a_shard_that_changes_while_it_is_read(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples(0, 3))
    found = source(path)
    os.truncate(path, 1000)
    with pytest.raises(UserError, match=r"00002\.png: .*0\.tar has changed since it was opened"):
        found[2]
    path = write_tar(tmp_path / "1.tar", samples(0, 3))
    found = source(path)
    tar._opened.cache_clear()
    path.unlink()
    with pytest.raises(UserError, match=r"1\.tar cannot be read"):
        found[0]
    write_tar(path, samples(3, 9))
    with pytest.raises(UserError, match=r"1\.tar has changed"):
        found[0]
    assert number_of(source(path)[0]["image"]) == 3


def test_the_fingerprint_is_of_pictures_captions_and_order(tmp_path):
    base = samples(0, 3)
    prints = {}
    for name, members in {
        "base": base,
        "same": base,
        "picture": [*base[:2], ("00001.png", picture(7)), *base[3:]],
        "caption": [*base[:5], ("00002.txt", b"other")],
        "order": [*base[2:], *base[:2]],
        "fewer": base[:4],
    }.items():
        prints[name] = source(write_tar(tmp_path / name / "0.tar", members)).fingerprint()
    assert prints["base"] == prints.pop("same")
    assert len(set(prints.values())) == len(prints)


def test_a_damaged_list_of_members_is_made_again(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_tar(tmp_path / "0.tar", samples(0, 2))
    captions = source(tmp_path, tmp_path / "cache").captions()
    (kept,) = (tmp_path / "cache" / "shards").glob("*.members")
    good = pq.read_table(kept)
    names, offsets, sizes = (good[name].to_pylist() for name in good.column_names)
    for columns in (
        {"offset": pa.array(offsets), "size": pa.array([10**15, *sizes[1:]])},
        {"offset": pa.array([-512, *offsets[1:]]), "size": pa.array(sizes)},
        {"offset": pa.array(list(map(str, offsets))), "size": pa.array(sizes)},
        {"offset": pa.array([None, *offsets[1:]]), "size": pa.array(sizes)},
    ):
        pq.write_table(pa.table({"name": pa.array(names), **columns}), kept)
        assert source(tmp_path, tmp_path / "cache").captions() == captions
    pq.write_table(good, kept, compression="NONE")
    kept.write_bytes(kept.read_bytes().replace(b"00001.png", b"0000\xff.png"))  # no text any more
    assert source(tmp_path, tmp_path / "cache").captions() == captions
