import pickle
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from torch.utils.data import DataLoader

import tiny
from caches import CAPTIONS, NUM, SHARD_ROWS, Mixed, build, contents, folder_of, mixed
from ldm.conditioner import Conditioner
from ldm.data import cache_folder, cache_layout, cache_reader, latents
from ldm.data.buckets import BucketBatches, Buckets
from ldm.data.cache_layout import Layout
from ldm.data.latents import cache_key, cached_latents, encoders_digest
from ldm.data.order import Shuffle
from ldm.data.pictures import Pictures
from ldm.errors import UserError

SQUARES = [0, 2, 4, 6, 8, 10]
TALL = [1, 5, 7, 9]
GROUPS = [SQUARES, TALL, [3]]


pytestmark = pytest.mark.usefixtures("small_shards")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_layout, "SHARD_ROWS", SHARD_ROWS)
        return build(tmp_path_factory.mktemp("cache"))


def all_batches(cache, epochs=range(3)):
    return [cache.__getitems__([(i, epoch) for i in group]) for group in GROUPS for epoch in epochs]


def assert_same(one, other):
    for first, second in zip(all_batches(one), all_batches(other), strict=True):
        assert all(torch.equal(first[key], second[key].cpu()) for key in ("moments", "context"))


# --------------------------------------------------------------------------------------------------------- content


@pytest.mark.parametrize("options", [{}, {"crop": "centre"}, {"crop": "centre", "flip": False}, {"fixed": True}])
@torch.inference_mode()
def test_a_cache_holds_what_encoding_gives(tmp_path, options):
    pictures = mixed(**options)
    cache = build(tmp_path, pictures=pictures)
    vae, conditioner = tiny.vae(), tiny.conditioner()
    assert len(cache) == NUM and cache.pictures is pictures
    assert cache.bucket_of is not None and cache.bucket_of.tolist() == pictures.bucket_of.tolist()
    seen = set()
    for group in GROUPS:
        for epoch in (0, 1, 5):
            indices, epochs = np.array(group), np.full(len(group), epoch)
            views = pictures.variant_numbers(indices, epochs, modulo=pictures.num_variants)
            seen |= set(views.tolist())
            texts = [CAPTIONS[i][k] for i, k in zip(group, pictures.caption_numbers(indices, epochs), strict=True)]
            batch = cache.__getitems__([(i, epoch) for i in group])
            assert {tensor.dtype for tensor in batch.values()} == {torch.float32}
            torch.testing.assert_close(
                batch["moments"], vae.encode(pictures.images(indices, views)), rtol=1e-5, atol=1e-5
            )
            torch.testing.assert_close(batch["context"], conditioner(texts), rtol=1e-5, atol=1e-5)
    assert seen == set(range(pictures.num_variants))


def test_a_set_of_squares_is_read_in_any_order(tmp_path):
    pictures = Pictures(tiny.Pixels(10, 20), 16)
    cache = build(tmp_path, pictures=pictures)
    indices = [9, 0, 4, 4, 7]
    batch = cache.__getitems__([(i, 2) for i in indices])
    with torch.inference_mode():
        moments = tiny.vae().encode(pictures.images(indices))
        context = tiny.conditioner()([pictures.captions[i][0] for i in indices])
    assert batch["moments"].shape == (5, 8, 8, 8) and batch["context"].shape == (5, 12, 16)
    torch.testing.assert_close(batch["moments"], moments, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(batch["context"], context, rtol=1e-5, atol=1e-5)
    assert cache.bucket_of is None and len(cache) == 10


def test_captions_and_views_change_from_epoch_to_epoch(cache):
    def kinds(key, index):
        batches = [cache.__getitems__([(index, epoch)])[key] for epoch in range(40)]
        return len({batch.numpy().tobytes() for batch in batches})

    assert [kinds("moments", i) for i in range(3)] == [4, 4, 4]
    assert [kinds("context", i) for i in (0, 1, 3, 7)] == [2, 1, 3, 1]


def test_the_null_context_is_kept_and_stands_for_empty_captions(cache):
    assert cache.null_context.shape == (1, 12, 16) and cache.null_context.dtype == torch.float32
    torch.testing.assert_close(cache.null_context[0], tiny.conditioner().null_context(), rtol=0, atol=1e-6)
    assert torch.equal(cache.__getitems__([(4, 0)])["context"], cache.null_context)


def test_a_caption_is_kept_once(cache):
    rows = [load_file(path)["rows"] for path in cache._context.paths]
    assert [len(part) for part in rows] == [4, 4, 2]
    assert sum(map(len, rows)) == len({text for texts in CAPTIONS for text in texts} | {""})
    same = [cache.__getitems__([(i, 0)])["context"] for i in (2, 7)]
    assert torch.equal(*same)


def test_moments_are_kept_not_samples(cache):
    moments, vae = cache.__getitems__([(0, 0), (2, 0)])["moments"], tiny.vae()
    draws = [vae.latents(moments, torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i))) for i in (0, 1)]
    assert not torch.allclose(*draws)


def test_a_file_holds_views_of_one_size_and_few_rows(cache):
    shapes = {path.name.rpartition("-")[0]: tuple(load_file(path)["rows"].shape) for path in folder_files(cache)}
    assert shapes == {
        "context-00000": (4, 12, 16),
        "context-00001": (4, 12, 16),
        "context-00002": (2, 12, 16),
        "moments-12x20-00000": (4, 4, 8, 10, 6),
        "moments-16x16-00000": (4, 4, 8, 8, 8),
        "moments-16x16-00001": (2, 4, 8, 8, 8),
        "moments-20x12-00000": (1, 4, 8, 6, 10),
    }
    assert cache.nbytes == sum(4 * int(np.prod(shape)) for shape in shapes.values())


def folder_files(cache):
    return sorted(cache._context.paths[0].parent.glob("*.safetensors"))


def test_shards_have_bounded_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_layout, "SHARD_BYTES", 2 * 12 * 16 * 4 + 1)  # two captions; less than one picture
    cache = build(tmp_path)
    assert len(cache._context.paths) == 5 and [len(rows.paths) for rows in cache._moments] == [4, 6, 1]
    assert_same(cache, build(tmp_path, memory="disk"))


def test_sizes_cannot_be_mixed_in_a_batch(cache):
    with pytest.raises(ValueError, match="more than one size"):
        cache.__getitems__([(0, 0), (1, 0)])


def test_batches_of_buckets_are_read(cache):
    batches = BucketBatches(Shuffle(NUM, 0), cache.bucket_of, batch_size=2, seed=0)
    for _, picks in zip(range(12), batches, strict=False):
        assert len(cache.__getitems__(picks)["moments"]) == 2


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("memory", ["auto", "disk"])
def test_a_loader_reads_whole_batches_and_gradients_flow(tmp_path, num_workers, memory):
    cache = build(tmp_path, memory=memory)
    picks = [[(0, 0), (2, 0)], [(9, 1), (1, 1)]]
    loader = DataLoader(cache, batch_sampler=picks, num_workers=num_workers, collate_fn=lambda batch: batch)
    batches = list(loader)
    assert torch.equal(batches[1]["context"], cache.__getitems__(picks[1])["context"])
    weight = torch.ones(16, requires_grad=True)
    (batches[0]["context"] * weight).sum().backward()
    assert weight.grad is not None


def test_channels_last_networks_give_the_same_cache(tmp_path, cache):
    vae = tiny.vae().to(memory_format=torch.channels_last)
    found = build(tmp_path, vae)
    assert folder_of(tmp_path).name == folder_files(cache)[0].parent.name
    for one, other in zip(all_batches(found), all_batches(cache), strict=True):
        torch.testing.assert_close(one["moments"], other["moments"], rtol=1e-4, atol=1e-5)
        assert one["moments"].is_contiguous()


def test_large_views_are_encoded_a_few_at_a_time(tmp_path, monkeypatch):
    sizes, vae = [], tiny.vae()
    encode = vae.encode
    vae.encode = lambda image: sizes.append(len(image)) or encode(image)
    monkeypatch.setattr(latents, "BATCH_PIXELS", 2 * 16 * 16 + 1)
    build(tmp_path, vae)
    assert max(sizes) == 2


def test_a_vae_in_bfloat16_encodes_too(tmp_path):
    batch = build(tmp_path, tiny.vae().bfloat16()).__getitems__([(0, 0)])
    assert batch["moments"].dtype == torch.float32 and batch["moments"].isfinite().all()


# --------------------------------------------------------------------------------------------------------- dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_rounded_to_the_dtype_once(tmp_path, cache, dtype):
    stored = build(tmp_path, dtype=dtype)
    assert stored.nbytes * 4 == cache.nbytes * dtype.itemsize
    assert {load_file(path)["rows"].dtype for path in folder_files(stored)} == {dtype}
    for one, other in zip(all_batches(stored), all_batches(cache), strict=True):
        for key in one:
            assert one[key].dtype == torch.float32 and torch.equal(one[key], other[key].to(dtype).float())


def test_values_beyond_fp16_are_refused_and_fit_bf16(tmp_path):
    vae = tiny.vae()
    with torch.no_grad():
        vae.quant_conv.bias[0] = 1e5
    with pytest.raises(UserError, match=r"picture \d+ .* up to 1e\+05, beyond .* float16: data.cache_dtype=bf16"):
        build(tmp_path / "fp16", vae, dtype=torch.float16)
    assert not list((tmp_path / "fp16").rglob("moments*.safetensors"))
    assert build(tmp_path / "bf16", vae, dtype=torch.bfloat16).__getitems__([(0, 0)])["moments"].isfinite().all()


def test_values_that_are_not_finite_are_refused(tmp_path):
    vae = tiny.vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        build(tmp_path, vae)


# --------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ram_disk_and_device_give_the_same_batches(tmp_path, dtype):
    caches = [build(tmp_path, dtype=dtype, memory=memory) for memory in ("auto", "disk", torch.device("cpu"))]
    assert [cache.in_memory for cache in caches] == [True, False, True]
    assert_same(caches[0], caches[1])
    assert_same(caches[0], caches[2])
    assert all(torch.equal(caches[0].null_context, cache.null_context) for cache in caches)


def test_what_is_held_is_one_tensor_of_a_size(cache):
    assert [rows.held for rows in (cache._context, *cache._moments)] == [True] * 4
    assert [tuple(rows.parts[0].shape) for rows in cache._moments] == [(16, 8, 10, 6), (24, 8, 8, 8), (4, 8, 6, 10)]
    assert all(len(rows.parts) == 1 for rows in (cache._context, *cache._moments))


def test_a_batch_is_no_view_of_the_cache(cache):
    before = cache.__getitems__([(0, 0)])
    changed = cache.__getitems__([(0, 0)])
    for key in changed:
        changed[key].zero_()
    assert all(torch.equal(before[key], value) for key, value in cache.__getitems__([(0, 0)]).items())


@pytest.mark.parametrize(("spare", "readers", "held"), [(0, 1, True), (-1, 1, False), (0, 2, False)])
def test_half_of_the_free_memory_is_taken_at_most(tmp_path, monkeypatch, cache, spare, readers, held):
    monkeypatch.setattr(cache_reader, "available_memory", lambda: 2 * cache.nbytes + spare)
    assert build(tmp_path, num_readers=readers).in_memory is held


def test_free_memory_is_what_the_system_and_the_container_tell(tmp_path, monkeypatch):
    info, limit, used = tmp_path / "meminfo", tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(cache_reader, "MEMORY_INFO", info)
    monkeypatch.setattr(cache_reader, "MEMORY_LIMIT", limit)
    monkeypatch.setattr(cache_reader, "MEMORY_USED", used)
    assert cache_reader.available_memory() > 2**20
    info.write_text("MemTotal:  9000 kB\nMemFree:  1 kB\nMemAvailable:    7000 kB\n")
    assert cache_reader.available_memory() == 7000 * 1024
    limit.write_text("max\n")
    assert cache_reader.available_memory() == 7000 * 1024
    limit.write_text("5000\n")
    used.write_text("2000\n")
    assert cache_reader.available_memory() == 3000


def test_a_device_that_is_too_small_is_told(tmp_path, monkeypatch):
    def no_room(*_args, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cache_reader.Rows, "hold", no_room)
    with pytest.raises(UserError, match=r"does not fit .* of cpu: data.cache_on_device=false"):
        build(tmp_path, memory=torch.device("cpu"))


def test_a_mapped_cache_is_sent_to_a_process_without_its_rows(tmp_path):
    cache = build(tmp_path, memory="disk")
    batch = cache.__getitems__([(0, 0)])
    cache._moments[1].parts[0].untyped_storage()
    assert len(pickle.dumps(cache._moments)) < 2000
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(batch["moments"], again.__getitems__([(0, 0)])["moments"])
    held = pickle.loads(pickle.dumps(build(tmp_path)))
    assert torch.equal(batch["moments"], held.__getitems__([(0, 0)])["moments"])


@pytest.mark.parametrize("damage", ["gone", "cut short"])
def test_a_file_that_goes_while_it_is_read_is_told_across_processes(tmp_path, damage):
    cache = build(tmp_path, memory="disk")
    path = cache._moments[1].paths[1]
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=path.name) as caught:
        cache.__getitems__([(0, 0)])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # safetensors' own errors cannot travel


# --------------------------------------------------------------------------------------------------------- disk space


@dataclass
class Usage:
    free: int


def test_a_disk_that_is_too_small_is_told_before_anything_is_done(tmp_path, monkeypatch, counting, cache):
    monkeypatch.setattr(cache_folder.shutil, "disk_usage", lambda _: Usage(cache.nbytes - 1))
    wanted = rf"needs {cache.nbytes / 1e9:.2f} GB more in {tmp_path}.* are free there: .*data.cache_dtype=bf16"
    with pytest.raises(UserError, match=wanted):
        build(tmp_path, counting.vae)
    assert counting.num == 0 and not list(tmp_path.iterdir())
    monkeypatch.setattr(cache_folder.shutil, "disk_usage", lambda _: Usage(cache.nbytes))
    build(tmp_path, counting.vae)
    monkeypatch.setattr(cache_folder.shutil, "disk_usage", lambda _: Usage(0))
    build(tmp_path, counting.vae)  # nothing is missing any more
    assert counting.num == 4 * NUM


@pytest.mark.parametrize("num_written", [0, 2, 5, 7])
def test_a_disk_that_becomes_full_leaves_whole_files_only(tmp_path, monkeypatch, num_written):
    build(tmp_path / "whole")
    calls = 0

    def full(number):
        nonlocal calls
        calls += 1
        if calls > num_written:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_folder.os, "fsync", full)
    with pytest.raises(UserError, match=r"no space is left .* GB are missing.*the same command goes on"):
        build(tmp_path / "full")
    monkeypatch.undo()
    monkeypatch.setattr(cache_layout, "SHARD_ROWS", SHARD_ROWS)
    found, whole = contents(folder_of(tmp_path / "full")), contents(folder_of(tmp_path / "whole"))
    assert len(found) == num_written and found.items() <= whole.items()
    build(tmp_path / "full")
    assert contents(folder_of(tmp_path / "full")) == whole


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cache.* cannot be written"):
        build(tmp_path / "cache")


# --------------------------------------------------------------------------------------------------------- the key


def key(pictures=None, vae=None, conditioner=None, dtype=torch.float32) -> str:
    pictures, vae, conditioner = pictures or mixed(), vae or tiny.vae(), conditioner or tiny.conditioner()
    return cache_key(pictures, Layout(pictures, vae, conditioner, dtype), encoders_digest(vae, conditioner))


def test_the_key_is_the_same_for_the_same():
    assert key() == key()


def test_the_key_is_the_same_after_use():
    conditioner, vae = tiny.conditioner(), tiny.vae()
    before = key(vae=vae, conditioner=conditioner)
    conditioner(["a red circle", "x" * 100])
    conditioner.tokenizer("no padding")
    vae.encode(torch.zeros(1, 3, 16, 16))
    assert key(vae=vae, conditioner=conditioner) == before


def changed(what: str, monkeypatch) -> str:
    source, vae, conditioner, options, dtype = Mixed(), tiny.vae(), tiny.conditioner(), {}, torch.float32
    with torch.no_grad():
        match what:
            case "one pixel":
                source.pixels[3][2, 1, 0] ^= 1
            case "one caption":
                source.texts[4] = ("j",)
            case "one caption more":
                source.texts[4] = ("", "a")
            case "order":
                source.pixels[0], source.pixels[2] = source.pixels[2], source.pixels[0]
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
            case "buckets":
                options = {"buckets": Buckets(16, 2)}
            case "no buckets":
                options = {"buckets": None}
            case "crop" | "flip" | "variants" | "seed":
                options = {what: {"crop": "centre", "flip": False, "variants": 6, "seed": 1}[what]}
            case "fixed":
                options = {"fixed": True}
            case "dtype":
                dtype = torch.bfloat16
            case "size of shards":
                monkeypatch.setattr(cache_layout, "SHARD_ROWS", 3)
            case "format":
                monkeypatch.setattr(latents, "FORMAT", 1)
    return key(mixed(source, **options), vae, conditioner, dtype)


CHANGES = [
    "one pixel", "one caption", "one caption more", "order", "vae weight", "vae precision", "vae option", "text weight",
    "text option", "length", "tokenizer", "padding", "buckets", "no buckets", "crop", "flip", "variants", "seed",
    "fixed", "dtype", "size of shards", "format",
]  # fmt: skip


def test_the_key_changes_with_everything_that_decides_the_content(monkeypatch):
    keys = {"nothing": key()}
    for what in CHANGES:
        with monkeypatch.context() as patch:
            keys[what] = changed(what, patch)
    assert len(set(keys.values())) == len(keys)


def test_another_set_gets_another_cache(tmp_path, counting):
    one, other = (build(tmp_path, counting.vae, mixed(Mixed(seed))) for seed in (0, 1))
    assert counting.num == 2 * 4 * NUM and len(list(tmp_path.iterdir())) == 2
    assert not torch.allclose(one.__getitems__([(0, 0)])["moments"], other.__getitems__([(0, 0)])["moments"])


def test_the_digest_of_the_encoders_can_be_told(tmp_path, monkeypatch):
    vae, conditioner = tiny.vae(), tiny.conditioner()
    digest = encoders_digest(vae, conditioner)
    build(tmp_path)
    monkeypatch.setattr(latents, "encoders_digest", None)  # not computed again
    cached_latents(tmp_path, mixed(), vae, conditioner, encoders=digest)
    folder_of(tmp_path)


@pytest.mark.parametrize("memory", ["auto", "disk"])
def test_a_file_of_other_rows_that_passes_for_whole_is_told(tmp_path, memory):
    """Its name is the digest of its bytes, so damage does not come so far; a person might."""
    build(tmp_path)
    folder = folder_of(tmp_path)
    for old in folder.glob("context-*.safetensors"):
        content = save({"rows": load_file(old)["rows"][:1].repeat(9, 1, 1)})
        old.with_name(f"{old.stem.rpartition('-')[0]}-{sha256(content).hexdigest()[:16]}.safetensors").write_bytes(
            content
        )
        old.unlink()
    with pytest.raises(UserError, match=r"it holds \(9, 12, 16\) in torch\.float32\. Remove it"):
        build(tmp_path, memory=memory)
