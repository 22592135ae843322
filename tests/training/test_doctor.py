"""`doctor=true` as typed, on sets with every fault that it knows, and on one without."""

import io
import json
import re
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.training import trial
from runs import TINY, TINY_OWN, run_script
from sets import shard_folder

OWN = ("data=folder", *TINY_OWN)


def picture(seed: int, size=(24, 24), suffix="PNG") -> bytes:
    rough = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC).save(file, suffix)
    return file.getvalue()


def good_set(folder: Path, num: int = 40) -> dict[str, str]:
    """Write pictures, and return their captions, which `describe` writes."""
    folder.mkdir(parents=True)
    for i in range(num):
        (folder / f"{i:03d}.png").write_bytes(picture(i))
    return {f"{i:03d}.png": f"a picture of thing {i}" for i in range(num)}


def describe(folder: Path, captions: dict[str, str]) -> None:
    rows = [{"file_name": name, "text": text} for name, text in captions.items()]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def look(tmp_path: Path, capsys, *overrides: str) -> tuple[int, list[str]]:
    code = run_script(
        "train", *OWN, f"data.path={tmp_path}/set", f"output_dir={tmp_path}/out", "name=look", "doctor=true", *overrides
    )
    told = capsys.readouterr()
    assert not told.err or "error" in told.err
    return code, [*told.out.splitlines(), *told.err.splitlines()]


def about(lines: list[str], mark: str, *words: str) -> bool:
    return any(line.startswith(mark) and all(word in line for word in words) for line in lines)


def test_a_good_set_is_told_so_and_nothing_is_trained(tmp_path, capsys):
    captions = good_set(tmp_path / "set")
    describe(tmp_path / "set", captions)
    code, lines = look(tmp_path, capsys)
    assert code == 0 and not about(lines, "✗")
    assert lines[-1].startswith("✓ nothing would ruin this run")
    topics = ("pictures", "sizes", "shapes", "cut", "duplicates", "captions", "samples", "latents", "length", "disk")
    for topic in topics:
        assert any(line[2:].startswith(topic) for line in lines), topic
    for stage in ("autoencoder: 16×16, batch 8", "clip: 16×16", "diffusion: 16×16, batch 8"):
        assert about(lines, " ", "steps", stage, "s a step", "images/s"), lines
    run_dir = tmp_path / "out" / "look"
    assert sorted(path.name for path in run_dir.iterdir()) == [".lock", "doctor.png"]
    assert not (tmp_path / "out" / "stages").exists()
    sheet = Image.open(run_dir / "doctor.png")
    assert sheet.width >= 4 * 16 and sheet.height > sheet.width  # sixteen pictures with captions below
    assert run_script("train", *OWN, f"data.path={tmp_path}/set", f"output_dir={tmp_path}/out", "name=look") == 0


def test_every_fault_planted_in_a_folder_is_found(tmp_path, capsys):
    folder = tmp_path / "set"
    captions = good_set(folder)
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes(picture(100)[:200])
    (folder / "page.jpg").write_bytes(b"<!DOCTYPE html><html>not found</html>")
    shutil.copy(folder / "003.png", folder / "again.png")
    image = Image.open(folder / "005.png")
    image.save(folder / "alike.jpg", quality=95)
    (folder / "wide.png").write_bytes(picture(101, (200, 20)))
    (folder / "little.png").write_bytes(picture(102, (9, 9)))
    (folder / "nameless.png").write_bytes(picture(103))
    captions |= {name: f"another {name}" for name in ("empty.png", "cut.png", "page.jpg", "again.png", "alike.jpg")}
    captions |= {"wide.png": "word " * 80, "little.png": "a photo", "nameless.png": ""}
    captions |= {f"{i:03d}.png": "a photo" for i in range(10, 16)}
    captions |= {"gone.png": "a picture that is not there"}
    describe(folder, captions)
    code, lines = look(tmp_path, capsys)
    assert code == 1
    told = "\n".join(lines)
    assert about(lines, "✗", "broken", "4 pictures (8.2%)")
    for name in ("empty.png", "cut.png", "page.jpg", "gone.png"):
        assert name in told and name in (tmp_path / "out/look/quarantine.txt").read_text()
    assert about(lines, "!", "duplicates", "1 pictures are exact copies", "003.png = again.png")
    assert about(lines, "", "look-alikes", "005.png", "alike.jpg")
    assert about(lines, "", "cut", "90% (wide.png)")
    assert about(lines, "!", "sizes", "1 pictures have a side under 16 px: little.png")
    assert about(lines, "✗", "captions", "1 pictures (2.2%) have none: nameless.png")
    assert about(lines, "!", "captions", "7 (16%) are the same: 'a photo'")
    assert about(lines, "", "captions", "1 (2.3%) are longer than 20 tokens", "word word")
    assert "broken" in lines[-1] and "captions" in lines[-1] and lines[-1].startswith("✗")


def test_shapes_are_kept_by_buckets_and_each_is_timed(tmp_path, capsys):
    folder = tmp_path / "set"
    captions = good_set(folder, 20)
    for i in range(10):
        (folder / f"{i:03d}.png").write_bytes(picture(i, (48, 24)))
    describe(folder, captions)
    code, lines = look(tmp_path, capsys, "data.buckets=true", "data.cache=false")
    assert code == 0
    assert about(lines, " ", "16 x 16") and about(lines, " ", "bucket", "worst crop")
    timed = [line for line in lines if "diffusion: " in line]
    assert len(timed) == 2 and sum("16×16" in line for line in timed) == 1


def test_what_ruins_a_run_later(tmp_path, capsys, monkeypatch):
    captions = good_set(tmp_path / "set", 20)
    describe(tmp_path / "set", captions)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    code, lines = look(tmp_path, capsys, "autoencoder.optim.lr=1e30", "autoencoder.optim.warmup_steps=0")
    assert code == 1
    assert about(lines, "✗", "disk", "0.0 MiB free")
    assert about(lines, "✗", "steps", "autoencoder", "the loss is nan") or about(lines, "✗", "the loss is inf")


def test_running_out_of_memory_is_a_finding(tmp_path, capsys, monkeypatch):
    captions = good_set(tmp_path / "set", 20)
    describe(tmp_path / "set", captions)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(trial.ClipModule, "training_step", full)
    code, lines = look(tmp_path, capsys)
    assert code == 1 and about(lines, "✗", "steps", "clip", "does not fit into memory", "smaller batch")


def test_encoders_that_are_there_are_judged(tmp_path, capsys):
    captions = good_set(tmp_path / "set", 20)
    describe(tmp_path / "set", captions)
    arguments = [*OWN, f"data.path={tmp_path}/set", f"output_dir={tmp_path}/out", "name=look"]
    assert run_script("train", *arguments, "stages=[autoencoder,clip]") == 0
    capsys.readouterr()
    code, lines = look(tmp_path, capsys)
    assert about(lines, "", "latents", "mean ± deviation") and about(lines, "", "VAE", "dB between 16 pictures")
    assert about(lines, "", "steps", "autoencoder: up to date")
    assert code == (1 if about(lines, "✗") else 0)


def told_bytes(lines: list[str], what: str) -> float:
    [line] = [line for line in lines if line[2:].startswith("disk")]
    found = re.search(rf"{what} ([\d.]+) MiB", line)
    assert found, line
    return float(found[1]) * 2**20


def test_averages_that_stay_are_counted(tmp_path, capsys):
    """Two lengths at steps 2, 4 and 5 of 5, each a file of its own; and both of them in each checkpoint."""
    describe(tmp_path / "set", good_set(tmp_path / "set", 20))
    steps = ["trainer.max_steps=5", "unet.block_out_channels=[64,64]", "++unet.norm_num_groups=8"]
    averages = "diffusion.posthoc_ema={lengths: [0.05, 0.1], every: 2}"
    _, before = look(tmp_path, capsys, *steps)
    _, after = look(tmp_path, capsys, *steps, averages)
    arguments = [*OWN, f"data.path={tmp_path}/set", f"output_dir={tmp_path}/out", "name=run", *steps, averages]
    assert run_script("train", *arguments) == 0
    run = tmp_path / "out" / "run"
    files = list((run / "ema").iterdir())
    sizes = sum(path.stat().st_size for path in files)
    assert len(files) == 6
    more = told_bytes(after, "checkpoints, model and 6 averages") - told_bytes(before, "checkpoints and model")
    weights = sizes / 6  # three checkpoints of two averages each
    assert more == pytest.approx(sizes + 6 * weights, rel=0.05)


def test_the_built_in_experiment(tmp_path, capsys):
    assert run_script("train", *TINY, f"output_dir={tmp_path}", "doctor=true") == 0
    out = capsys.readouterr().out
    assert "64 to train on, 8 held out" in out and "✓" in out


def test_a_set_of_which_nothing_can_be_used(tmp_path, capsys):
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.png").write_bytes(b"")
    describe(folder, {f"{i}.png": f"thing {i}" for i in range(6)})
    code, lines = look(tmp_path, capsys)
    assert code == 1 and about(lines, "✗", "pictures", "data.num_val=4")
    assert about(lines, "✗", "broken", "6 pictures (100.0%)") and "0.png: not a picture" in "\n".join(lines)


def test_a_stage_that_is_missing_ruins_the_run(tmp_path, capsys):
    describe(tmp_path / "set", good_set(tmp_path / "set", 20))
    code, lines = look(tmp_path, capsys, "stages=[diffusion]")
    assert code == 1 and about(lines, "✗", "config", "the result of stage 'autoencoder'")


def test_broken_pictures_of_a_stream_are_found(tmp_path, capsys):
    images = [picture(i) for i in range(20)]
    images[3] = b""
    shard_folder(tmp_path / "set", images, [f"thing {i}" for i in range(20)], size=5)
    arguments = ["data=shards", "data.streaming=true", "data.cache=false"]
    code, lines = look(tmp_path, capsys, *arguments)
    assert code == 1 and about(lines, "✗", "broken", "1 pictures (4.8%)", "quarantine.txt")
    again, _ = look(tmp_path, capsys, *arguments)
    assert again == 1 and len((tmp_path / "out/look/quarantine.txt").read_text().splitlines()) == 1


def test_shapes_that_few_pictures_have_are_told(tmp_path, capsys):
    folder = tmp_path / "set"
    captions = good_set(folder, 30)
    (folder / "000.png").write_bytes(picture(0, (48, 24)))
    describe(folder, captions)
    _, lines = look(tmp_path, capsys, "data.buckets=true")
    assert about(lines, "!", "batches", "has 1 pictures, which fill a batch of 8 again and again")
