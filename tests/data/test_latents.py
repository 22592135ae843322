import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import tiny
from ldm.conditioner import Conditioner
from ldm.data import latents
from ldm.data.datamodule import Pictures
from ldm.data.latents import MANIFEST, cache_key, cached_latents
from tiny import Pixels

NUM, SHARD = 10, 4  # three shards, the last one short
FILES = ["null.safetensors", "shard-00000.safetensors", "shard-00001.safetensors", "shard-00002.safetensors"]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(latents, "SHARD_SIZE", SHARD)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class CountingVAE:
    """Counts the pictures that are encoded."""

    def __init__(self):
        self.vae = tiny.vae()
        self.num = 0
        encode = self.vae.encode

        def counted(image):
            self.num += len(image)
            return encode(image)

        self.vae.encode = counted


@pytest.fixture
def counting():
    return CountingVAE()


def pictures(num=NUM, side=20, resolution=16, seed=0) -> Pictures:
    return Pictures(Pixels(num, side, seed), resolution)


def build(root, counting=None, batch_size=3, **options):
    vae = counting.vae if counting else tiny.vae()
    return cached_latents(root, pictures(**options), vae, tiny.conditioner(), batch_size)


def folder_of(root: Path) -> Path:
    (folder,) = root.iterdir()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def everything(cache) -> dict[str, torch.Tensor]:
    return cache.__getitems__(list(range(len(cache))))


def flip(path: Path, position: int = -5) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


# --------------------------------------------------------------------------------------------------------- content


def test_a_cache_holds_what_encoding_gives(tmp_path):
    cache = build(tmp_path)
    vae, conditioner = tiny.vae(), tiny.conditioner()
    indices = [9, 0, 4, 4, 7]
    batch, fresh = cache.__getitems__(indices), pictures().__getitems__(indices)
    with torch.inference_mode():
        moments, context = vae.encode(fresh["image"]), conditioner(fresh["caption"])
    assert len(cache) == NUM
    assert batch["moments"].shape == (5, 8, 8, 8) and batch["context"].shape == (5, 12, 16)
    assert {tensor.dtype for tensor in batch.values()} == {torch.float32}
    torch.testing.assert_close(batch["moments"], moments, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch["context"], context, rtol=1e-5, atol=1e-5)


def test_the_null_context_is_kept(tmp_path):
    cache = build(tmp_path)
    assert cache.null_context.shape == (1, 12, 16)
    torch.testing.assert_close(cache.null_context[0], tiny.conditioner().null_context(), rtol=0, atol=1e-6)


def test_moments_are_kept_not_samples(tmp_path):
    moments = everything(build(tmp_path))["moments"]
    vae = tiny.vae()
    draws = [
        vae.latents(moments, torch.randn(NUM, 4, 8, 8, generator=torch.Generator().manual_seed(i))) for i in (0, 1)
    ]
    assert not torch.allclose(*draws)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_reads_whole_batches_and_gradients_flow(tmp_path, num_workers):
    cache = build(tmp_path)
    loader = DataLoader(cache, batch_sampler=[[1, 2], [9, 3]], num_workers=num_workers, collate_fn=lambda batch: batch)
    batches = list(loader)
    assert torch.equal(batches[1]["context"], cache.__getitems__([9, 3])["context"])
    weight = torch.ones(16, requires_grad=True)
    (batches[0]["context"] * weight).sum().backward()
    assert weight.grad is not None


def test_channels_last_networks_give_the_same_cache(tmp_path):
    vae = tiny.vae().to(memory_format=torch.channels_last)
    assert cache_key(pictures(), vae, tiny.conditioner()) == cache_key(pictures(), tiny.vae(), tiny.conditioner())
    found = everything(cached_latents(tmp_path, pictures(), vae, tiny.conditioner()))
    torch.testing.assert_close(found["moments"], everything(build(tmp_path / "plain"))["moments"], rtol=1e-4, atol=1e-5)
    assert found["moments"].is_contiguous()


# ------------------------------------------------------------------------------------------------ reuse and repair


def test_a_whole_cache_is_not_built_again(tmp_path, counting):
    first = everything(build(tmp_path, counting))
    assert counting.num == NUM
    before = contents(folder_of(tmp_path))
    again = everything(build(tmp_path, counting))
    assert counting.num == NUM
    assert contents(folder_of(tmp_path)) == before
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_files_are_those_of_the_format(tmp_path):
    build(tmp_path)
    folder = folder_of(tmp_path)
    assert sorted(contents(folder)) == sorted([*FILES, MANIFEST])
    assert set(json.loads((folder / MANIFEST).read_text())) == set(FILES)


@pytest.mark.parametrize("name", FILES[1:])
def test_an_interrupted_build_is_finished_not_begun_again(tmp_path, counting, name):
    build(tmp_path, counting)
    folder = folder_of(tmp_path)
    before, counting.num = contents(folder), 0
    (folder / MANIFEST).unlink()
    (folder / name).unlink()
    (folder / name).with_suffix(".tmp").write_bytes(b"half a shard")
    build(tmp_path, counting)
    assert counting.num == (2 if name == FILES[3] else SHARD)
    assert contents(folder) == before


@pytest.mark.parametrize("damage", [b"", b"half", None])
def test_a_shard_that_is_no_shard_is_not_taken_over(tmp_path, counting, damage):
    build(tmp_path, counting)
    folder = folder_of(tmp_path)
    before, counting.num = contents(folder), 0
    (folder / MANIFEST).unlink()
    shard = folder / FILES[2]
    shard.write_bytes(shard.read_bytes()[:-40] if damage is None else damage)
    build(tmp_path, counting)
    assert counting.num == SHARD and contents(folder) == before


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("position", [0, 30, -5])
def test_a_flipped_byte_is_found_and_mended(tmp_path, counting, name, position):
    first = everything(build(tmp_path, counting))
    folder = folder_of(tmp_path)
    before, counting.num = contents(folder), 0
    flip(folder / name, position)
    again = build(tmp_path, counting)
    assert counting.num == {FILES[0]: 0, FILES[3]: 2}.get(name, SHARD)
    assert contents(folder) == before
    assert all(torch.equal(first[key], everything(again)[key]) for key in first)


def test_damage_is_found_beside_a_missing_shard(tmp_path, counting):
    build(tmp_path, counting)
    folder = folder_of(tmp_path)
    before, counting.num = contents(folder), 0
    (folder / FILES[1]).unlink()
    flip(folder / FILES[2])
    build(tmp_path, counting)
    assert counting.num == 2 * SHARD and contents(folder) == before


def test_repair_cut_short_finds_the_damage_again(tmp_path, counting, monkeypatch):
    build(tmp_path, counting)
    folder = folder_of(tmp_path)
    before, counting.num = contents(folder), 0
    flip(folder / FILES[1])
    flip(folder / FILES[2])
    unlink, num_unlinked = Path.unlink, 0

    def unlink_one(path, missing_ok=False):
        nonlocal num_unlinked
        num_unlinked += 1
        if num_unlinked == 2:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_one)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, counting)
    monkeypatch.undo()
    monkeypatch.setattr(latents, "SHARD_SIZE", SHARD)
    build(tmp_path, counting)
    assert contents(folder) == before


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"shard-00000.safetensors": 3}', "\x00\x01"])
def test_a_damaged_manifest_is_made_again(tmp_path, counting, content):
    build(tmp_path, counting)
    folder = folder_of(tmp_path)
    before = contents(folder)
    (folder / MANIFEST).write_text(content)
    build(tmp_path, counting)
    assert contents(folder) == before


def test_any_flipped_byte_of_the_manifest_is_survived(tmp_path):
    reference = everything(build(tmp_path))
    folder = folder_of(tmp_path)
    before = contents(folder)
    for position in range(0, len(before[MANIFEST]), 29):
        flip(folder / MANIFEST, position)
        found = everything(build(tmp_path))
        assert all(torch.equal(reference[key], found[key]) for key in reference)
        assert contents(folder) == before


def test_an_error_while_building_leaves_no_cache_that_looks_whole(tmp_path, counting):
    class Breaks(Pixels):
        def __getitem__(self, index):
            if index == 6:
                raise ValueError("disk on fire")
            return super().__getitem__(index)

    with pytest.raises(ValueError, match="disk on fire"):
        cached_latents(tmp_path, Pictures(Breaks(NUM, 20), 16), counting.vae, tiny.conditioner())
    assert sorted(contents(folder_of(tmp_path))) == FILES[:2]
    counting.num = 0
    build(tmp_path, counting)
    assert counting.num == NUM - SHARD


# --------------------------------------------------------------------------------------------------------- the key


def key(source=None, resolution=16, vae=None, conditioner=None) -> str:
    return cache_key(Pictures(source or Pixels(NUM), resolution), vae or tiny.vae(), conditioner or tiny.conditioner())


def test_the_key_is_the_same_for_the_same():
    assert key() == key()


def test_the_key_is_the_same_after_use():
    conditioner, vae = tiny.conditioner(), tiny.vae()
    before = key(vae=vae, conditioner=conditioner)
    conditioner(["a red circle", "x" * 100])
    conditioner.tokenizer("no padding")
    vae.encode(torch.zeros(1, 3, 16, 16))
    assert key(vae=vae, conditioner=conditioner) == before


def changed(what: str) -> str:
    source, vae, conditioner = Pixels(NUM), tiny.vae(), tiny.conditioner()
    with torch.no_grad():
        match what:
            case "one pixel":
                source.pixels[3, 2, 1, 0] ^= 1
            case "one caption":
                source.texts[4] += "."
            case "order":
                source.pixels = np.roll(source.pixels, 1, axis=0)
            case "number":
                source = Pixels(NUM + 1)
            case "vae weight":
                vae.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
            case "vae precision":
                vae.bfloat16()
            case "vae option":
                vae.config["act_fn"] = "gelu"
            case "text weight":
                conditioner.text_tower.embeddings.token_embedding.weight[7, 3] += 1e-3
            case "text option":
                conditioner.text_tower.config["hidden_act"] = "gelu"
            case "length":
                conditioner.max_length = 8
            case "tokenizer":
                other = tiny.train_tokenizer(["something else entirely"] * 9, 560, 12)
                conditioner = Conditioner(other, conditioner.text_tower)
            case "padding":
                other = tiny.train_tokenizer(tiny.CAPTIONS, 560, 12)
                other.pad_token = "!"
                conditioner = Conditioner(other, conditioner.text_tower)
    return key(source, 32 if what == "resolution" else 16, vae, conditioner)


CHANGES = [
    "one pixel", "one caption", "order", "number", "resolution", "vae weight", "vae precision", "vae option",
    "text weight", "text option", "length", "tokenizer", "padding",
]  # fmt: skip


def test_the_key_changes_with_all_that_decides_the_content(monkeypatch):
    keys = {what: changed(what) for what in CHANGES}
    keys["nothing"] = key()
    monkeypatch.setattr(latents, "SHARD_SIZE", SHARD + 1)
    keys["shard size"] = key()
    assert len(set(keys.values())) == len(keys), keys


def test_another_set_gets_a_cache_of_its_own(tmp_path, counting):
    one, other = build(tmp_path, counting), build(tmp_path, counting, seed=1)
    assert counting.num == 2 * NUM and len(list(tmp_path.iterdir())) == 2
    assert not torch.allclose(everything(one)["moments"], everything(other)["moments"])


# ------------------------------------------------------------------------------------------------------- processes

SCRIPT = """
import sys, time
import tiny, torch
from pathlib import Path
from ldm.data import latents
from ldm.data.datamodule import Pictures

root, pause = Path(sys.argv[1]), float(sys.argv[2])
torch.set_num_threads(1)
latents.SHARD_SIZE = 4
vae, num = tiny.vae(), 0
encode = vae.encode

def slow(image):
    global num
    num += len(image)
    time.sleep(pause)
    return encode(image)

vae.encode = slow
pictures = Pictures(tiny.Pixels(10, 20), 16)
print("ready", flush=True)
sys.stdin.readline()
cache = latents.cached_latents(root, pictures, vae, tiny.conditioner(), 3)
print(num, len(cache), float(cache.__getitems__(list(range(10)))["moments"].double().sum()), flush=True)
"""


def start(root: Path, pause: float = 0.0) -> subprocess.Popen:
    tests = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent / 'src'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(root), str(pause)]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_one_cache_end_with_one_good_cache(tmp_path):
    build(tmp_path / "alone")
    processes = [start(tmp_path / "both", pause=0.05) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # both are let go before either is waited for
        process.stdin.write("\n")
        process.stdin.flush()
    numbers = [process.communicate(timeout=60)[0].splitlines()[-1].split() for process in processes]
    assert sorted(int(encoded) for encoded, *_ in numbers) == [0, NUM]
    assert numbers[0][1:] == numbers[1][1:]
    assert contents(folder_of(tmp_path / "both")) == contents(folder_of(tmp_path / "alone"))


def test_a_killed_build_is_resumed_to_the_same_bytes(tmp_path, counting):
    build(tmp_path / "whole")
    process = start(tmp_path / "killed", pause=0.3)
    process.stdout.readline()
    process.stdin.write("\n")
    process.stdin.flush()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("*/shard-00001.safetensors")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = folder_of(tmp_path / "killed")
    assert not (folder / MANIFEST).exists() and not (folder / FILES[3]).exists()
    build(tmp_path / "killed", counting)
    assert counting.num == 2
    assert contents(folder) == contents(folder_of(tmp_path / "whole"))
