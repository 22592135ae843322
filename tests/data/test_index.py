import hashlib
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm.data import index as index_module
from ldm.data.images import examine
from ldm.data.index import CHUNK, look_at
from ldm.errors import UserError

NAMES = ["a.png", "b c\n.png", "é\udcff.png", "d.png", "e.png"]


def png(i: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (8 + i % 5, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Files:
    """Pictures in memory that count how often each is read."""

    def __init__(self, files: list[bytes | Exception]) -> None:
        self.files, self.reads, self.lock = files, [0] * len(files), threading.Lock()

    def __call__(self, i: int) -> bytes:
        with self.lock:
            self.reads[i] += 1
        if isinstance(found := self.files[i], Exception):
            raise found
        return found


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "cache" / "index.parquet"  # a folder that is not there yet


def look(names, files, kept=None, stamps=None):
    return look_at(names, stamps or ["1"] * len(names), files, kept, "looking")


def same(one, other) -> bool:
    lists = all(getattr(one, name) == getattr(other, name) for name in ("names", "digests", "faults"))
    return lists and (one.sizes == other.sizes).all() and bool((one.likenesses == other.likenesses).all())


def test_what_is_found(kept):
    pictures = [png(i) for i in range(5)]
    index = look(NAMES, Files(pictures), kept)
    assert index.names == NAMES
    assert index.sizes.tolist() == [[9, 8], [9, 9], [9, 10], [9, 11], [9, 12]]
    assert index.digests == [hashlib.sha256(picture).hexdigest() for picture in pictures]
    assert index.likenesses.tolist() == [examine(picture).likeness for picture in pictures]
    assert index.faults == [""] * 5
    assert (index.sizes.dtype, index.likenesses.dtype) == (np.int32, np.uint64)


def test_a_fault_is_no_error_and_says_why(kept):
    files = Files(
        [
            png(0),
            b"",
            b"<html>",
            png(1)[:60],
            FileNotFoundError(2, "No such file"),
            ValueError(),
            UserError("not there"),
        ]
    )
    index = look([str(i) for i in range(7)], files, kept)
    assert index.faults[0] == ""
    assert all("picture" in index.faults[i] for i in (1, 2, 3))
    assert index.faults[4:] == ["cannot be read: No such file", "cannot be read: ValueError", "not there"]
    assert [bool(digest) for digest in index.digests] == [True] * 4 + [False] * 3
    assert index.sizes[1:].tolist() == [[0, 0]] * 6


def test_an_empty_set():
    index = look([], Files([]))
    assert (len(index.names), index.sizes.shape, index.likenesses.shape) == (0, (0, 2), (0,))


# ------------------------------------------------------------------------------------------------------- what is kept


def test_what_is_known_is_not_looked_at_again(kept):
    files = Files([png(0), b"broken", *map(png, (2, 3, 4))])
    first = look(NAMES, files, kept)
    again = look(NAMES, files, kept)
    assert same(first, again)
    assert files.reads == [1] * 5  # what is broken stays broken, too


def test_only_what_changed_or_came_is_looked_at(kept):
    files = Files([png(i) for i in range(5)])
    look(NAMES, files, kept, ["1", "2", "3", "4", "5"])
    # another order, one gone, one changed, one renamed to a name that was never seen
    names = ["e.png", NAMES[2], "a.png", "new.png"]
    later = Files([png(4), png(7), png(0), png(3)])
    index = look(names, later, kept, ["5", "3 changed", "1", "4"])
    assert later.reads == [0, 1, 0, 1]
    assert same(index, look(names, later))


def test_what_could_not_be_read_is_tried_again(kept):
    look(["a", "b"], Files([png(0), OSError(5, "Input/output error")]), kept)
    files = Files([png(0), png(1)])
    index = look(["a", "b"], files, kept)
    assert (index.faults, files.reads) == (["", ""], [0, 1])


def test_nothing_is_kept_without_a_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    look(NAMES, Files([png(i) for i in range(5)]))
    assert not list(tmp_path.iterdir())


def test_a_damaged_index_is_made_anew(kept):
    pictures = [png(i) for i in range(5)]
    found = look(NAMES, Files(pictures), kept)
    whole = kept.read_bytes()
    for damaged in (b"", b"\0" * 99, whole[:-1], whole[: len(whole) // 2], b"PAR1" * 20):
        kept.write_bytes(damaged)
        files = Files(pictures)
        assert same(look(NAMES, files, kept), found)
        assert files.reads == [1] * 5
        assert kept.read_bytes() == whole


def test_a_flipped_byte_changes_nothing(kept):
    pictures = [png(i) for i in range(5)]
    found = look(NAMES, Files(pictures), kept)
    whole = kept.read_bytes()
    for place in np.random.default_rng(0).choice(len(whole), 100, replace=False):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        kept.write_bytes(damaged)
        assert same(look(NAMES, Files(pictures), kept), found), place


@pytest.mark.parametrize("foreign", ["table", "other version"])
def test_a_foreign_file_is_passed_over(kept, foreign):
    files = Files([png(0)])
    look(["a"], files, kept)
    if foreign == "table":
        pq.write_table(pa.table({"name": [b"a"], "stamp": [b"1"]}), kept)
    else:
        table = pq.read_table(kept)
        pq.write_table(table.replace_schema_metadata({b"ldm": b"index of pictures, 0"}), kept)
    look(["a"], files, kept)
    assert files.reads == [2]


def test_an_index_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be kept in"):
        look(["a"], Files([png(0)]), tmp_path / "file" / "index.parquet")


# ----------------------------------------------------------------------------------------------------- interruptions


def test_ctrl_c_keeps_what_was_found(kept):
    picture, num = png(0), 20 * CHUNK
    names = [str(i) for i in range(num)]

    class Interrupted(Files):
        def __call__(self, i: int) -> bytes:
            if i == num // 2:
                raise KeyboardInterrupt
            return super().__call__(i)

    first = Interrupted([picture] * num)
    with pytest.raises(KeyboardInterrupt):
        look(names, first, kept)
    assert sum(first.reads) < num  # what had not begun was not begun
    files = Files([picture] * num)
    assert same(look(names, files, kept), look(names, Files([picture] * num)))
    assert sum(files.reads) == num // 2  # all before it was kept, in order


def test_ctrl_c_does_not_wait_for_all_the_rest(kept, monkeypatch):
    @contextmanager
    def interrupted(*_):
        yield lambda count: signal.raise_signal(signal.SIGINT)

    class Slow(Files):
        def __call__(self, i: int) -> bytes:
            time.sleep(0.001)
            return super().__call__(i)

    monkeypatch.setattr(index_module, "progress", interrupted)
    files = Slow([png(0)] * 40 * CHUNK)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt):
            look([str(i) for i in range(40 * CHUNK)], files, kept)
    finally:
        signal.signal(signal.SIGINT, before)
    assert CHUNK <= sum(files.reads) < 39 * CHUNK


def test_a_look_that_is_killed_goes_on(tmp_path, kept):
    """Saves as often as it can, so that what was found before is there when the process dies without a word."""
    script = f"""
        import os, signal, time
        from pathlib import Path
        from ldm.data import index

        index.SAVE_EVERY = 0
        kept, picture = Path({str(kept)!r}), Path("picture.png").read_bytes()

        def read(i):
            if i == {6 * CHUNK}:
                while not kept.exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            return picture

        index.look_at([str(i) for i in range({8 * CHUNK})], ["1"] * {8 * CHUNK}, read, kept, "looking")
    """
    (tmp_path / "picture.png").write_bytes(png(0))
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    names, files = [str(i) for i in range(8 * CHUNK)], Files([png(0)] * 8 * CHUNK)
    index = look(names, files, kept)
    assert index.faults == [""] * len(names)
    assert 2 * CHUNK <= sum(files.reads) < len(names)
    assert max(files.reads) == 1


def test_saving_takes_a_small_part_of_the_time(kept, monkeypatch):
    saved = []
    monkeypatch.setattr(index_module, "_save", lambda kept, index, stamps, known: saved.append(int(known.sum())))
    look([str(i) for i in range(4 * CHUNK)], Files([png(0)] * 4 * CHUNK), kept)
    assert saved == [4 * CHUNK]  # once, at the end, where it is done in no time
    saved.clear()
    monkeypatch.setattr(index_module, "SAVE_EVERY", 0)
    monkeypatch.setattr(index_module.time, "monotonic", iter(np.arange(1000.0)).__next__)
    look([str(i) for i in range(4 * CHUNK)], Files([png(0)] * 4 * CHUNK), kept)
    assert saved[0] == CHUNK and len(saved) < 4  # saving seems to take a second: not again for twenty


def test_pictures_are_looked_at_by_several_threads():
    seen, both = set(), threading.Barrier(2, timeout=10)

    def read(i: int) -> bytes:
        seen.add(threading.get_ident())
        if i % CHUNK == 0 and i < 2 * CHUNK:
            both.wait()  # passed only where two are in here at once
        return png(0)

    index = look([str(i) for i in range(2 * CHUNK)], read)
    assert index.faults == [""] * 2 * CHUNK
    assert len(seen) > 1 and os.getpid() not in seen


def test_of_several_processes_one_looks_and_the_others_read_what_it_found(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from ldm.data import images, index\n"
        "def examine(encoded):\n"
        "    with open(sys.argv[2], 'a') as file: file.write('x')\n"
        "    time.sleep(0.02); return images.Examined(8, 8, 1)\n"
        "index.images = type('', (), {'examine': staticmethod(examine)})\n"
        "names = [str(i) for i in range(50)]\n"
        "found = index.look_at(names, names, lambda i: b'x', Path(sys.argv[1]), 'looking')\n"
        "print(found.sizes.sum())\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "a.parquet"), str(tmp_path / "looks")]
    runs = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [run.communicate(timeout=60)[0].strip() for run in runs] == ["800"] * 3
    assert (tmp_path / "looks").read_text() == "x" * 50
