import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from caches import NUM, SHARD_ROWS, Mixed, build, contents, folder_of, mixed
from ldm.data import cache_folder, cache_layout
from ldm.data.cache_folder import LOCKS, MANIFEST
from ldm.errors import UserError

VIEWS = 4 * NUM
ENCODED = {  # views that each file holds, by its name less the digest
    "context-00000": 0,
    "context-00001": 0,
    "context-00002": 0,
    "moments-12x20-00000": 16,
    "moments-16x16-00000": 16,
    "moments-16x16-00001": 8,
    "moments-20x12-00000": 4,
}


pytestmark = pytest.mark.usefixtures("small_shards")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What the files of a cache are that is built at one go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_layout, "SHARD_ROWS", SHARD_ROWS)
        root = tmp_path_factory.mktemp("whole")
        build(root)
        return contents(folder_of(root))


@pytest.fixture
def folder(tmp_path, whole):
    """A whole cache."""
    build(tmp_path)
    return folder_of(tmp_path)


def shard(folder: Path, name: str) -> Path:
    (path,) = folder.glob(f"{name}-*.safetensors")
    return path


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << position % 8
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------ reuse and repair


def test_a_whole_cache_is_not_built_again(tmp_path, counting, whole, capsys):
    first = build(tmp_path, counting.vae)
    assert counting.num == VIEWS and f"encoded {NUM} pictures and 10 captions in 0 s" in capsys.readouterr().out
    again = build(tmp_path, counting.vae)
    assert counting.num == VIEWS and not capsys.readouterr().out
    assert contents(folder_of(tmp_path)) == whole
    picks = [(0, 0), (2, 3)]
    assert torch.equal(first.__getitems__(picks)["moments"], again.__getitems__(picks)["moments"])


def test_a_whole_cache_is_read_where_nothing_can_be_written(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(cache_folder.CacheFolder, "_lock", None)
    monkeypatch.setattr(cache_folder.CacheFolder, "_write", None)
    build(tmp_path)


def test_files_are_those_of_the_format(folder, whole):
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest.pop("files") == sorted(whole.keys() - {MANIFEST})
    assert manifest == {"format": 2, "pictures": NUM, "views": 4, "captions": 10}
    assert {name.rpartition("-")[0] for name in whole if name != MANIFEST} == set(ENCODED)
    assert {path.name for path in folder.iterdir()} == {*whole, LOCKS}


@pytest.mark.parametrize("name", ENCODED)
def test_an_interrupted_build_is_finished_not_begun_again(tmp_path, folder, counting, whole, name):
    (folder / MANIFEST).unlink()
    shard(folder, name).unlink()
    (folder / f".{name}.tmp").write_bytes(b"half a shard")
    build(tmp_path, counting.vae)
    assert counting.num == ENCODED[name]
    assert contents(folder) == whole


@pytest.mark.parametrize("damage", [b"", b"half", None])
@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_shard_that_is_no_shard_is_not_taken_over(tmp_path, folder, counting, whole, damage, with_manifest):
    path = shard(folder, "moments-16x16-00000")
    path.write_bytes(path.read_bytes()[:-40] if damage is None else damage)
    if not with_manifest:
        (folder / MANIFEST).unlink()
    build(tmp_path, counting.vae)
    assert counting.num == 16 and contents(folder) == whole


def test_a_flipped_byte_is_found_wherever_it_is_and_its_shard_alone_mended(tmp_path, folder, counting, whole, capsys):
    for name, num in ENCODED.items():
        path = shard(folder, name)
        size = path.stat().st_size
        for position in (0, 7, 8, 30, 60, size // 2, size - 1):
            counting.num = 0
            capsys.readouterr()
            flip(path, position)
            build(tmp_path, counting.vae)
            assert counting.num == num and contents(folder) == whole, (name, position)
            assert [line for line in capsys.readouterr().out.splitlines() if "damaged" in line] == [
                f"  {path} is damaged and is made anew"
            ]


def test_any_flipped_byte_of_the_manifest_is_mended(tmp_path, folder, counting, whole):
    for position in range(0, len(whole[MANIFEST]), 41):
        flip(folder / MANIFEST, position)
        build(tmp_path, counting.vae)
        assert contents(folder) == whole
    assert counting.num == 0


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"files": 3}', "\x00\x01"])
def test_a_damaged_manifest_is_made_again(tmp_path, folder, counting, whole, content):
    (folder / MANIFEST).write_text(content)
    build(tmp_path, counting.vae)
    assert counting.num == 0 and contents(folder) == whole


def test_damage_of_several_kinds_is_mended_at_once(tmp_path, folder, counting, whole):
    shard(folder, "moments-16x16-00001").unlink()
    flip(shard(folder, "moments-12x20-00000"), 1000)
    flip(shard(folder, "context-00001"), 100)
    flip(folder / MANIFEST, 9)
    build(tmp_path, counting.vae)
    assert counting.num == 8 + 16 and contents(folder) == whole


def test_a_shard_under_the_name_of_another_is_found(tmp_path, folder, counting, whole):
    one, other = shard(folder, "moments-16x16-00000"), shard(folder, "moments-16x16-00001")
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    build(tmp_path, counting.vae)
    assert counting.num == 16 + 8 and contents(folder) == whole


def test_repair_cut_short_finds_the_damage_again(tmp_path, folder, whole, monkeypatch):
    flip(shard(folder, "moments-12x20-00000"), 1000)
    flip(shard(folder, "moments-16x16-00000"), 1000)
    unlink, num_unlinked = Path.unlink, 0

    def unlink_one(path, missing_ok=False):
        nonlocal num_unlinked
        num_unlinked += 1
        if num_unlinked == 2:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_one)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path)
    build(tmp_path)
    assert contents(folder) == whole


def test_an_error_while_building_keeps_what_is_whole(tmp_path, counting, whole):
    class Breaks(Mixed):
        def __getitem__(self, index):
            if index == 4:
                raise UserError("disk on fire")
            return super().__getitem__(index)

    with pytest.raises(UserError, match="disk on fire"):
        build(tmp_path, counting.vae, mixed(Breaks()))
    found = contents(folder_of(tmp_path))
    assert {name.rpartition("-")[0] for name in found} == {name for name in ENCODED if name < "moments-16"}
    counting.num = 0
    build(tmp_path, counting.vae)
    assert counting.num == VIEWS - 16 and contents(folder_of(tmp_path)) == whole


# ------------------------------------------------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def start():
    """Start processes that build a cache: start(root, pause) gives the id of one that is running."""
    tests = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent / 'src'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(tests / "caches.py")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True) as server:

        def say(line: str) -> None:
            server.stdin.write(line)
            server.stdin.flush()

        def started(root: Path, pause: float = 0.0, last: int = 0) -> int:
            say(f"{pause} {last} {root}\n")
            return int(server.stdout.readline())

        assert server.stdout.readline() == "ready\n"
        yield started
        server.stdin.close()


def wait_for(pid: int) -> None:
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def encoded_by(root: Path, pid: int) -> int:
    return int(Path(f"{root}.{pid}").read_text())


@pytest.mark.parametrize("num", [2, 3])
def test_processes_at_one_cache_share_the_work_and_end_with_one_good_cache(tmp_path, start, whole, num):
    root = tmp_path / "cache"
    pids = [start(root, pause=0.02) for _ in range(num)]
    for pid in pids:
        wait_for(pid)
    counts = [encoded_by(root, pid) for pid in pids]
    assert sum(counts) == VIEWS and sum(count > 0 for count in counts) >= 2
    assert contents(folder_of(root)) == whole


def test_processes_share_the_repair_of_one_cache(tmp_path, start, whole):
    root = tmp_path / "cache"
    build(root)
    for name in ENCODED:
        flip(shard(folder_of(root), name), 500)
    pids = [start(root, pause=0.01) for _ in range(2)]
    for pid in pids:
        wait_for(pid)
    assert sum(encoded_by(root, pid) for pid in pids) == VIEWS
    assert contents(folder_of(root)) == whole


def test_a_build_killed_at_random_moments_ten_times_is_resumed_to_the_same_bytes(tmp_path, start, whole):
    root, draw, kills, seen = tmp_path / "cache", random.Random(0), 0, set()
    while kills < 10:
        pid = start(root, pause=0.003)
        enough = len(whole) * kills // 10  # each time a little farther, however fast the machine is
        wait_until(lambda: len(list(root.glob("*/*"))) > enough or not Path(f"/proc/{pid}").exists())  # noqa: B023
        time.sleep(draw.uniform(0.0, 0.05))
        if not Path(f"/proc/{pid}").exists():  # it was faster: take something away
            draw.choice(list(folder_of(root).glob("moments*"))).unlink()
            continue
        os.kill(pid, signal.SIGKILL)
        wait_for(pid)
        kills += 1
        found = {name: content for name, content in contents(folder_of(root)).items() if not name.startswith(".")}
        assert found.items() <= whole.items()
        seen.add(len(found))
    build(root)
    assert len(seen) > 2
    assert contents(folder_of(root)) == whole


def test_a_process_that_dies_at_a_shard_is_replaced_by_the_one_that_waits(tmp_path, start, whole):
    root = tmp_path / "cache"
    slow = start(root, pause=1.0)
    wait_until(lambda: list(root.glob("*/context-00002*")))  # it is at its first pictures now
    quick = start(root)
    wait_until(lambda: len(list(root.glob("*/moments*"))) == 3)
    time.sleep(0.05)
    assert Path(f"/proc/{quick}").exists()
    os.kill(slow, signal.SIGKILL)
    wait_for(quick)
    assert encoded_by(root, quick) == VIEWS
    assert contents(folder_of(root)) == whole


def test_a_build_that_dies_before_any_of_its_steps_is_resumed_to_the_same_bytes(tmp_path, start, whole):
    for last in range(1, 1000):
        root = tmp_path / str(last)
        pid = start(root, last=last)
        wait_for(pid)
        if Path(f"{root}.{pid}").exists():  # it came to its end
            break
        if root.exists():
            build(root)
            assert contents(folder_of(root)) == whole, last
    assert last > 4 * len(whole)
