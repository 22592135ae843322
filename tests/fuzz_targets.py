"""What `fuzz.py` damages: small good files of every kind that the project reads, and how each is used."""

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image, ImageCms, PngImagePlugin
from safetensors.torch import load_file

import caches
import sets
import tiny
from fuzz import Target
from ldm.config import SampleConfig, TrainConfig, check, load_run_config
from ldm.data import cache_layout, remote
from ldm.data import folder as folder_module
from ldm.data.folder import FolderSource
from ldm.data.hub import HubSource
from ldm.data.images import decode, examine
from ldm.data.shards import TarSource
from ldm.data.stream import open_stream
from ldm.errors import UserError
from ldm.gallery import save_png
from ldm.nn.autoencoder import AutoencoderKL
from ldm.report.metrics import read_metrics
from ldm.training.checkpointing import AtomicCheckpointIO, newest_whole, read_header
from ldm.weights.archive import read_archive, write_archive
from ldm.weights.folder import load_network, save_network
from ldm.weights.hub import check_source
from ldm.weights.model import load_model, load_part, save_single_file
from ldm.weights.posthoc import FOLDER, Snapshot, reconstruct, save_snapshot
from runs import TINY, compose_values

VAE: dict[str, Any] = {"block_out_channels": [4], "down_block_types": ["DownEncoderBlock2D"],
                       "up_block_types": ["UpDecoderBlock2D"], "norm_num_groups": 2, "mid_block_add_attention": False,
                       "sample_size": 8}  # fmt: skip
UNET: dict[str, Any] = {"block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 1}


# ---------------------------------------------------------------------------------------------------------- models


def make_model(folder: Path) -> None:
    tiny.write_model_folder(folder, **UNET)
    save_network(tiny.vae(**VAE), folder / "vae")


def draw(source: Path) -> None:
    """Load a model as `sample.py` does and draw a picture with it, in one step."""
    from ldm.pipeline import LatentDiffusionPipeline

    pipeline = LatentDiffusionPipeline.from_pretrained(source)
    side = 8 * pipeline.vae.downscale_factor
    list(pipeline.generate(["a red circle"], [0], steps=1, height=side, width=side))


def make_single_files(folder: Path) -> None:
    make_model(folder / "model")
    model = load_model(str(folder / "model"))
    save_single_file(model, folder / "model.safetensors")
    torch.save({"state_dict": load_file(folder / "model.safetensors")}, folder / "model.ckpt")
    shutil.rmtree(folder / "model")


def use_single_files(folder: Path) -> None:
    everyone(
        partial(load_model, str(folder / "model.safetensors")),
        partial(read_archive, folder / "model.ckpt"),
    )


def everyone(*uses: Callable[[], Any]) -> None:
    """Use all there is, whatever comes of the first; then let the first refusal out."""
    refusals = []
    for use in uses:
        try:
            use()
        except UserError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def make_networks(folder: Path) -> None:
    vae = tiny.vae(**VAE)
    save_network(vae, folder / "whole")
    save_network(vae, folder / "shards")
    state = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    names = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(state)}
    for file in set(names.values()):
        torch.save({name: tensor for name, tensor in state.items() if names[name] == file}, folder / "shards" / file)
    (folder / "shards" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "shards" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    write_archive(folder / "lone.safetensors", {"vae": vae})


def use_networks(folder: Path) -> None:
    everyone(
        partial(load_network, AutoencoderKL, folder / "whole", torch.bfloat16),
        partial(load_network, AutoencoderKL, folder / "shards"),
        partial(load_part, AutoencoderKL, str(folder / "lone.safetensors")),
    )


def make_tokenizer(folder: Path) -> None:
    tiny.tokenizer().save_pretrained(folder)


def use_tokenizer(folder: Path) -> None:
    from ldm.conditioner import Conditioner
    from ldm.weights.tokenizer import load_tokenizer

    try:
        conditioner = Conditioner(load_tokenizer(folder), tower())
    except ValueError as error:  # its users tell where it came from
        raise UserError(str(error)) from error
    conditioner(["a small red circle", ""])


@cache
def tower() -> Any:
    return tiny.text_tower()


# ----------------------------------------------------------------------------------------------------- checkpoints


def make_checkpoints(folder: Path) -> None:
    layer = torch.nn.Linear(3, 3)
    adam = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    adam.step()
    for step in (3, 4):
        content = {
            "identity": {"seed": 0, "unet": {"block_out_channels": [8, 8]}}, "version": 1, "global_step": step,
            "state_dict": layer.state_dict(), "optimizer_states": [adam.state_dict()], "lr_schedulers": [], "epoch": 0,
            "callbacks": {"x": {"best": None}}, "loops": {"fit_loop": {"state_dict": {}}},
        }  # fmt: skip
        AtomicCheckpointIO().save_checkpoint(content, folder / "last.ckpt")
    os.replace(folder / "previous.ckpt", folder / "alone.ckpt")


def use_checkpoints(folder: Path) -> None:
    def resume() -> None:
        if found := newest_whole(folder):
            AtomicCheckpointIO().load_checkpoint(found[0])["state_dict"]

    def read() -> None:
        with suppress(FileNotFoundError):  # which says that there is none
            read_header(folder / "alone.ckpt")

    everyone(resume, read)


def make_averages(folder: Path) -> None:
    for step in (2, 4):
        for length in (0.05, 0.1):
            save_snapshot(folder / FOLDER, Snapshot(step, length), {"a": torch.ones(3), "b": torch.zeros(2, 2)}, 2)


# ------------------------------------------------------------------------------------------------------------ data


def read_all(source: Any) -> None:
    """Read every picture of a source that it does not call broken, as a run does; one that is is a refusal."""
    source.captions(), source.sizes(), source.fingerprint()
    everyone(*(partial(source.__getitem__, i) for i in range(len(source))))


def make_cache(folder: Path) -> None:
    cache_layout.SHARD_ROWS = caches.SHARD_ROWS
    built_cache(folder)


def built_cache(folder: Path) -> Any:
    return caches.cached_latents(folder, caches.mixed(), cache_encoders()[0], cache_encoders()[1], batch_size=3)


@cache
def cache_encoders() -> Any:
    return tiny.vae(), tiny.conditioner()


def use_cache(folder: Path) -> None:
    """What is damaged is made again; of what claims to be whole, each row is read."""
    cached = built_cache(folder)
    for i in range(len(cached)):
        batch = cached.__getitems__([(i, 0)])
        assert batch["moments"].dtype == torch.float32 and batch["context"].shape == (1, 12, 16)


def forge_cache(folder: Path) -> None:
    """Name damaged files after their bytes, so that they pass for whole ones."""
    for path in folder.glob("*/*.safetensors"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        path.rename(path.with_name(f"{path.stem.rpartition('-')[0]}-{digest}.safetensors"))
    use_cache(folder)


def make_folder(folder: Path) -> None:
    sets.picture_folder(folder / "set", ["a.png", "b.png", "c d.png", "sub/e.png"])


def folder_source(folder: Path, cached: bool = False, **options: Any) -> FolderSource:
    return FolderSource(sets.folder_data(folder / "set", **options), decode, folder / "cache" if cached else None)


def make_index(folder: Path) -> None:
    known_by_size()
    make_folder(folder)
    use_index(folder)


def known_by_size() -> None:
    """Let the state of a file be its size alone: what was found out about one folder holds for a copy of it."""
    remote.local_state = folder_module.local_state = lambda status: str(status.st_size)


def use_index(folder: Path) -> None:
    """A damaged index is made again: the pictures are as good as ever."""
    for kept in sorted((folder / "cache").glob("*.parquet")):
        digest = hashlib.sha256(os.fsencode(folder / "set")).hexdigest()[:16]  # goes by the folder's name
        os.replace(kept, kept.with_name(f"folder-{digest}.parquet"))
    source = folder_source(folder, cached=True)
    assert not any(source.index.faults), source.index.faults
    read_all(source)


def make_metadata(kind: str, folder: Path) -> None:
    sets.picture_folder(folder / "set", ["a.png", "b.png"], None)
    rows = [{"file_name": name, "text": f"caption of {name}", "artist": "Ann"} for name in ("a.png", "b.png")]
    path = folder / "set" / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)


def use_metadata(folder: Path) -> None:
    read_all(folder_source(folder, caption_template="{caption} by {artist}"))


def make_sidecars(folder: Path) -> None:
    sets.sidecar_folder(folder / "set", sets.pngs(3), ["a red house", "ein Haus, rot", "🙂 é"])


def make_tars(folder: Path) -> None:
    sets.shard_folder(folder / "set", sets.pngs(4), sets.texts(4), size=2)


def use_tars(folder: Path) -> None:
    read_all(TarSource(sets.shards_data(folder / "set"), decode, None))


def make_listed_tars(folder: Path) -> None:
    known_by_size()
    make_tars(folder)
    use_listed_tars(folder)


def use_listed_tars(folder: Path) -> None:
    with working_in(folder):
        read_all(TarSource(sets.shards_data("set"), decode, Path("cache")))


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Let paths be relative: what was found out goes by them."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def make_stream(folder: Path) -> None:
    known_by_size()
    make_tars(folder)
    (folder / "set" / "sizes.json").write_text('{"000.tar": 2}')
    use_stream(folder)


def use_stream(folder: Path) -> None:
    with working_in(folder):
        read_stream(sets.shards_data("set", streaming=True))


def read_stream(config: Any) -> None:
    stream = open_stream(config, decode, Path("cache"), 0.5, Path("report.txt"))
    stream.fingerprint(), stream.captions()
    everyone(*(partial(stream.__getitem__, i) for i in range(min(len(stream), 8))))


def make_parquet(folder: Path) -> None:
    rows = [{"image": {"bytes": sets.png((i, 0, 0)), "path": None}, "text": f"caption {i}"} for i in range(4)]
    (folder / "set").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "set" / "train.parquet", row_group_size=2, compression="NONE")


def use_parquet_stream(folder: Path) -> None:
    remote.PAUSES = ()  # nothing comes back that is damaged
    with working_in(folder):
        read_stream(sets.hub_data(f"file://{folder}/set", streaming=True))


def use_parquet_set(folder: Path) -> None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = folder / "hf"
    datasets.disable_progress_bars()
    read_all(HubSource(sets.hub_data(folder / "set"), decode, None))


# -------------------------------------------------------------------------------------------------------- pictures


def make_pictures(folder: Path) -> None:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    color = Image.fromarray(draw.integers(0, 256, (13, 17, 3), np.uint8))
    clear = Image.fromarray(draw.integers(0, 256, (9, 11, 4), np.uint8))
    deep = Image.fromarray(draw.integers(0, 2**16, (7, 9), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    color.save(folder / "plain.jpg", exif=exif, icc_profile=profile)
    color.convert("CMYK").save(folder / "print.jpg")
    color.save(folder / "progressive.jpg", progressive=True)
    color.save(folder / "color.png", icc_profile=profile)
    clear.save(folder / "clear.png", exif=exif)
    deep.save(folder / "deep.png")
    color.quantize(8).save(folder / "palette.png", transparency=3)
    color.save(folder / "moving.png", save_all=True, append_images=[color.rotate(90)])
    color.save(folder / "moving.gif", save_all=True, append_images=[color.rotate(90)])
    clear.save(folder / "clear.gif")
    color.save(folder / "lossy.webp")
    clear.save(folder / "lossless.webp", lossless=True, exif=exif)
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        color.save(folder / f"{compression}.tif", compression=compression)
    deep.save(folder / "deep.tif")
    Image.fromarray(draw.random((5, 6), np.float32)).save(folder / "float.tif")
    color.save(folder / "plain.bmp")
    color.quantize(4).save(folder / "palette.bmp")
    color.save(folder / "plain.ppm")
    color.save(folder / "plain.avif")
    color.save(folder / "plain.jp2")
    clear.save(folder / "plain.ico")
    color.save(folder / "plain.dds")


GOOD: dict[str, bytes] = {}


def use_pictures(folder: Path) -> None:
    """Read what is not as it was, or at first all, in all the ways that there are."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    changed = [content for name, content in files.items() if GOOD.get(name) != content]
    GOOD.update({} if GOOD else files)
    uses = [partial(examine, content) for content in changed]
    uses += [partial(decode, content, (0, 9, 255), channels, at_least) for content in changed
             for channels, at_least in ((1, 0), (3, 4), (4, 0))]  # fmt: skip
    everyone(*uses)


SETTINGS: dict[str, Any] = {
    "prompt": "a red circle", "negative_prompt": "", "seed": 3, "ckpt": "some/model", "vae": None, "sampler": "ddim",
    "steps": 20, "spacing": "trailing", "eta": 0.0, "guidance_scale": 3.0, "guidance_rescale": 0.0,
    "guidance_interval": None, "clip_skip": 0, "strength": None, "height": 32, "width": 32, "init_image": None,
    "mask": None, "mask_blur": 0, "outpaint": None, "vae_tile": None, "dtype": "fp32", "device": "cpu",
    "batch": [0, 1], "size": [32, 32], "model": "model", "model_hash": "0" * 64, "ldm_version": "0.1.0",
}  # fmt: skip


def make_settings(folder: Path) -> None:
    folder.mkdir(parents=True)
    save_png(folder / "drawn.png", np.zeros((4, 4, 3), np.uint8), SETTINGS)
    (folder / "settings.json").write_text(json.dumps(SETTINGS))


def use_settings(folder: Path) -> None:
    """Take up the settings in a picture, as `from_image=` does; those of the JSON file in a picture that is whole."""
    from ldm.sampling import _again, _asked

    told = PngImagePlugin.PngInfo()
    text = (folder / "settings.json").read_bytes() if (folder / "settings.json").exists() else b""
    told.add_itxt("ldm", text.decode("utf-8", "replace"))
    whole = folder / "whole.png"
    with io.BytesIO() as file:
        Image.new("L", (1, 1)).save(file, "PNG", pnginfo=told)
        whole.write_bytes(file.getvalue())

    def take_up(path: Path) -> None:
        values, place, copies, _ = _again({**sample_values(), "from_image": str(path)}, ())
        config = check(SampleConfig, values)
        prompts, seeds = _asked(config)
        check_source(config.ckpt)
        assert len(prompts) == len(seeds) and 0 <= place < copies <= 1024

    everyone(partial(take_up, whole), partial(take_up, folder / "drawn.png"))


@cache
def sample_values() -> dict[str, Any]:
    values = compose_values("sample")
    return {**values, "ckpt": values.get("ckpt") or "model"}


# ------------------------------------------------------------------------------------------------------------ runs


def make_run(folder: Path) -> None:
    """Write what a run leaves, of few rows: plots take the most of the time."""
    from test_report import EVALUATION, metrics_rows

    values = check(TrainConfig, compose_values("train", [*TINY, f"output_dir={folder.parent}"]))
    folder.mkdir(parents=True)
    told = values.model_dump(by_alias=True, mode="json")
    (folder / "config.yaml").write_text(yaml.safe_dump(told, sort_keys=False, allow_unicode=True))
    rows = metrics_rows()
    (folder / "metrics.csv").write_text("\n".join([rows[0], *rows[-4:]]) + "\n")
    (folder / "overrides.txt").write_text("experiment=shapes\nname='tiny run'\n")
    (folder / "env.json").write_text(json.dumps({"torch": "2.99", "platform": "Linux"}))
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "quarantine.txt").write_text("broken.png: cannot be decoded\n")
    (folder / "model").mkdir()
    (folder / "model" / "stage.json").write_text(json.dumps({"key": "0" * 12, "pictures": "1" * 64, "inputs": {}}))
    (folder / "model" / ".text_encoder").write_text("clip-0123456789ab")
    (folder / "model" / "model_index.json").write_text("{}")
    (folder / "samples" / "diffusion").mkdir(parents=True)
    save_png(folder / "samples" / "diffusion" / "step-000100.png", np.zeros((4, 4, 3), np.uint8))


def use_run(folder: Path) -> None:
    """Read what a later command reads of a run: its config, its figures, whether it is done."""
    from ldm.evaluation.table import show
    from ldm.sweep import last_values
    from ldm.training.stages import is_done, recorded_pictures

    good = check(TrainConfig, {**run_values(), "run_dir": str(folder)})
    everyone(
        partial(load_run_config, folder), partial(read_metrics, folder / "metrics.csv"), partial(last_values, folder),
        partial(is_done, good, "diffusion"), partial(recorded_pictures, folder / "model"),
        partial(show, folder / "evaluation.json"),
    )  # fmt: skip


@cache
def run_values() -> dict[str, Any]:
    return compose_values("train", list(TINY))


def use_report(folder: Path) -> None:
    from ldm.report import write_report

    write_report(folder)


def make_sweep(folder: Path) -> None:
    for seed in (0, 1):
        job = folder / f"seed-{seed}"
        job.mkdir(parents=True)
        config = {"seed": seed, "stages": ["autoencoder", "diffusion"], "optimized_metric": None, "name": "x"}
        (job / "config.yaml").write_text(yaml.safe_dump(config))
        (job / "overrides.txt").write_text(f"recipe=v\nseed={seed}\n")
        (job / "metrics.csv").write_text(f"metric,step,value,unix_time\ndiffusion/val_loss,3,0.{seed}5,1.0\n")


def use_sweep(folder: Path) -> None:
    from ldm.sweep import summarize

    summarize(folder)


def suffixes(*kinds: str) -> Callable[[str], bool]:
    return lambda name: name.endswith(kinds)


TARGETS: dict[str, Target] = {
    "model": Target(make_model, draw, lambda name: not name.endswith("merges.txt")),
    "single_file": Target(make_single_files, use_single_files),
    "network": Target(make_networks, use_networks),
    "tokenizer": Target(make_tokenizer, use_tokenizer),
    "checkpoint": Target(make_checkpoints, use_checkpoints),
    "averages": Target(make_averages, lambda folder: reconstruct(folder / FOLDER, 0.08)),
    "cache": Target(make_cache, use_cache),
    "forged_cache": Target(make_cache, forge_cache, suffixes(".safetensors")),
    "index": Target(make_index, use_index, suffixes(".parquet")),
    "folder": Target(make_folder, lambda folder: read_all(folder_source(folder))),
    "metadata_jsonl": Target(partial(make_metadata, "jsonl"), use_metadata, suffixes(".jsonl")),
    "metadata_csv": Target(partial(make_metadata, "csv"), use_metadata, suffixes(".csv")),
    "metadata_parquet": Target(partial(make_metadata, "parquet"), use_metadata, suffixes(".parquet")),
    "captions": Target(make_sidecars, lambda folder: read_all(folder_source(folder)), suffixes(".txt")),
    "tar": Target(make_tars, use_tars),
    "tar_lists": Target(make_listed_tars, use_listed_tars, suffixes(".members", ".parquet")),
    "stream": Target(make_stream, use_stream, suffixes(".tar", ".json", ".jsonl")),
    "parquet_stream": Target(make_parquet, use_parquet_stream),
    "parquet_set": Target(make_parquet, use_parquet_set),
    "pictures": Target(make_pictures, use_pictures),
    "settings": Target(make_settings, use_settings, may_read=True),
    "run": Target(make_run, use_run),
    "report": Target(make_run, use_report),
    "sweep": Target(make_sweep, use_sweep),
}
