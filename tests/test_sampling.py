"""`sample.py` as typed: every mode, pictures that are drawn again, and what an interruption leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import tiny
from ldm.gallery import read_settings
from ldm.weights.folder import save_network
from runs import ROOT, run_script

PROMPT = "prompt=a large red circle"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model_folder(tmp_path_factory.mktemp("sampling") / "model")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty current directory with a picture and a mask in it."""
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((24, 16), Image.Resampling.BICUBIC).save("picture.png")
    mask = np.zeros((16, 24), np.uint8)
    mask[4:12, 8:20] = 255
    Image.fromarray(mask).save("mask.png")
    return tmp_path


def draw(*arguments: str, out: str = "out") -> list[Path]:
    assert run_script("sample", *arguments, f"out={out}", "device=cpu") == 0
    return sorted(path for path in Path(out).iterdir() if path.name != "grid.png")


def pixels(path: Path | str) -> np.ndarray:
    return np.asarray(Image.open(path))


# ------------------------------------------------------------------------------------------------------------- modes


def test_a_list_of_seeds_draws_each_prompt_from_each(model, place):
    (place / "prompts.txt").write_text("a large red circle\na small green star\n")
    paths = draw(f"ckpt={model}", "prompt_file=prompts.txt", "seed=[5,2]", "steps=2")
    assert [read_settings(path)["seed"] for path in paths] == [5, 2, 5, 2]
    one = draw(f"ckpt={model}", "prompt=a small green star", "seed=2", "steps=2", out="one")
    assert np.abs(pixels(one[0]).astype(int) - pixels(paths[3])).max() <= 1


def test_img2img_keeps_the_size_and_follows_strength(model, place):
    options = [f"ckpt={model}", PROMPT, "init_image=picture.png", "steps=20"]
    [weak] = draw(*options, "strength=0.05", out="weak")
    [strong] = draw(*options, "strength=1", out="strong")
    [default] = draw(*options, out="default")
    assert Image.open(weak).size == Image.open(strong).size == (24, 16)
    assert read_settings(default)["strength"] == 0.8
    [itself] = draw(*options, "strength=0.05", "guidance_scale=1", out="itself")
    assert not np.array_equal(pixels(weak), pixels(strong))
    assert not np.array_equal(pixels(weak), pixels(itself))


def test_inpainting_keeps_black_to_the_pixel(model, place):
    paths = draw(f"ckpt={model}", PROMPT, "init_image=picture.png", "mask=mask.png", "num_images=3", "steps=3")
    kept = pixels("mask.png") == 0
    for path in paths:
        assert np.array_equal(pixels(path)[kept], pixels("picture.png")[kept])
        assert not np.array_equal(pixels(path)[~kept], pixels("picture.png")[~kept])


def test_outpainting_grows_around_the_picture(model, place):
    [path] = draw(f"ckpt={model}", PROMPT, "init_image=picture.png", "outpaint=left:8,bottom:4", "steps=3")
    assert Image.open(path).size == (32, 20)
    assert np.array_equal(pixels(path)[:16, 8:], pixels("picture.png"))


def test_an_inpainting_unet_is_recognised_and_sees_the_mask(place, tmp_path, capsys):
    folder = tiny.write_model_folder(tmp_path / "nine", in_channels=9)
    paths = draw(f"ckpt={folder}", PROMPT, "init_image=picture.png", "mask=mask.png", "steps=3")
    kept = pixels("mask.png") == 0
    assert np.array_equal(pixels(paths[0])[kept], pixels("picture.png")[kept])
    Image.fromarray(255 - pixels("mask.png")).save("other.png")
    [other] = draw(f"ckpt={folder}", PROMPT, "init_image=picture.png", "mask=other.png", "steps=3", out="other")
    assert not np.array_equal(pixels(other), pixels(paths[0]))
    for arguments in (["out=x"], ["init_image=picture.png"]):
        assert run_script("sample", f"ckpt={folder}", PROMPT, *arguments) == 2
        assert "this is an inpainting model: give" in capsys.readouterr().err


def test_parts_from_elsewhere(model, place):
    save_network(tiny.vae(seed=9), place / "vae")
    save_network(tiny.unet(seed=9), place / "unet, (other)")
    plain, vae, unet = (
        draw(f"ckpt={model}", PROMPT, "steps=2", *more, out=f"out{i}")[0]
        for i, more in enumerate(([], ["vae=vae"], ["unet=unet, (other)"]))
    )
    assert not np.array_equal(pixels(plain), pixels(vae)) and not np.array_equal(pixels(plain), pixels(unet))
    assert read_settings(unet)["unet"] == "unet, (other)"


# ------------------------------------------------------------------------------------------------------- drawn again

AGAIN = {
    "text2img": ["sampler=euler_a", "steps=4", "negative_prompt=blue, small", "guidance_rescale=0.5"],
    "interval": ["sampler=dpmpp_2m", "spacing=karras", "steps=5", "guidance_interval=[0.3,5]", "clip_skip=1"],
    "img2img": ["init_image=picture.png", "strength=0.6", "steps=5", "sampler=dpmpp_2m_sde"],
    "inpainting": ["init_image=picture.png", "mask=mask.png", "mask_blur=3", "steps=3"],
    "outpainting": ["init_image=picture.png", "outpaint=right:8", "steps=3", "sampler=ddim", "eta=0.5"],
    "tiles": ["height=32", "width=48", "vae_tile=16", "steps=2"],
}


@pytest.mark.parametrize("name", AGAIN)
def test_a_picture_is_drawn_again_bit_for_bit(name, model, place):
    """Also one from the middle of a batch, or from a last batch that is not full."""
    paths = draw(f"ckpt={model}", PROMPT, "num_images=5", "batch_size=3", "seed=40", *AGAIN[name])
    for path in (paths[1], paths[4]):
        [again] = draw(f"from_image={path}", out=f"again-{path.stem}")
        assert np.array_equal(pixels(again), pixels(path))
        assert read_settings(again) == read_settings(path)
        assert again.read_bytes() == path.read_bytes()


def test_what_is_said_besides_is_changed(model, place):
    [path] = draw(f"ckpt={model}", PROMPT, "seed=3", "steps=4", "sampler=heun", "guidance_scale=2")
    [other] = draw(f"from_image={path}", "prompt=a small green star", "steps=5", out="other")
    before, after = read_settings(path), read_settings(other)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"prompt", "steps"} and after["prompt"] == "a small green star"
    paths = draw(f"from_image={path}", "seed=3", "num_images=3", out="more")
    assert [read_settings(path)["seed"] for path in paths] == [3, 4, 5]


def test_a_picture_drawn_upon_must_be_there_as_it_was(model, place, capsys):
    [path] = draw(f"ckpt={model}", PROMPT, "init_image=picture.png", "steps=2")
    Image.new("RGB", (24, 16), "red").save("picture.png")
    assert run_script("sample", f"from_image={path}", "out=again") == 2
    assert "init_image=picture.png is not there as" in capsys.readouterr().err
    Path("picture.png").unlink()
    assert run_script("sample", f"from_image={path}", "out=again") == 2
    Image.new("RGB", (24, 16), "blue").save("blue.png")
    assert run_script("sample", f"from_image={path}", "init_image=blue.png", "out=again") == 0


def test_what_a_picture_brings_can_be_taken_out(model, place):
    [path] = draw(f"ckpt={model}", PROMPT, "init_image=picture.png", "mask=mask.png", "steps=2", "seed=3")
    [whole] = draw(f"from_image={path}", "mask=", out="whole")
    [alone] = draw(f"from_image={path}", "init_image=", out="alone")
    assert read_settings(whole)["mask"] is None and read_settings(whole)["init_image"] == "picture.png"
    assert read_settings(alone)["init_image"] is None and Image.open(alone).size == (16, 16)
    [plain] = draw(f"ckpt={model}", PROMPT, "steps=2", "seed=3", out="plain")
    assert np.array_equal(pixels(alone), pixels(plain))


def test_a_picture_drawn_upon_another_takes_its_size(model, place):
    [path] = draw(f"ckpt={model}", PROMPT, "steps=2")
    [other] = draw(f"from_image={path}", "init_image=picture.png", out="other")
    assert Image.open(other).size == (24, 16) and read_settings(other)["strength"] == 0.8
    [masked] = draw(f"from_image={other}", "mask=mask.png", out="masked")
    assert read_settings(masked)["strength"] == 1.0


def test_a_model_that_has_changed_is_said_to_have(place, tmp_path, capsys):
    folder = tiny.write_model_folder(tmp_path / "changing")
    [path] = draw(f"ckpt={folder}", PROMPT, "steps=2")
    save_network(tiny.unet(seed=5), folder / "unet")
    draw(f"from_image={path}", out="again")
    assert "warning: " in (said := capsys.readouterr().out) and "has changed since" in said
    draw(f"from_image={path}", f"ckpt={folder}", out="stated")
    assert "warning" not in capsys.readouterr().out


def test_nothing_is_written_over(model, place):
    first = draw(f"ckpt={model}", PROMPT, "steps=2", "num_images=2")
    before = [path.read_bytes() for path in first]
    paths = draw(f"ckpt={model}", PROMPT, "steps=2", "num_images=2")
    assert [path.name[:4] for path in paths] == ["0000", "0001", "0002", "0003"]
    assert [path.read_bytes() for path in first] == before
    draw(f"ckpt={model}", PROMPT, f"init_image={paths[0]}", "steps=2")
    assert first[0].read_bytes() == before[0]


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"steps": "many"}, {"ckpt": 3}, {"ckpt": "/nowhere", "prompt": "x"}, {"sampler": "rm -rf"},
        {"prompt": None}, {"batch": [0, 10**9]}, {"seed": -1}, {"_target_": "os.system"}, {"seed": [1, 2]},
        {"height": 80_000_000}, {"out": "elsewhere"}, {"num_images": 10**12},
        {"prompt_file": "secret.txt"}, {"prompt": None, "prompt_file": "secret.txt"}, {"from_image": "x.png"},
        {"ckpt": "\ud800"}, {"ckpt": "x" * 5000}, {"ckpt": "~nobody/x"}, {"init_image": "x" * 5000},
        {"mask": "~nobody/x"}, {"init_image": "\0"}, {"init_image": "\ud800", "init_image_sha256": None},
    ],
)  # fmt: skip
def test_the_text_of_a_picture_is_data_and_is_checked(settings, model, place, capsys):
    info = PngImagePlugin.PngInfo()
    base = {} if not settings else {"ckpt": str(model), "prompt": "x", "steps": 2, "seed": 0}
    info.add_itxt("ldm", json.dumps({**base, **settings}))
    Image.new("RGB", (16, 16)).save("hostile.png", pnginfo=info)
    (place / "secret.txt").write_text("a secret")
    harmless = {"_target_", "batch", "out", "num_images", "prompt_file", "from_image"} & set(settings)
    harmless = set() if settings.get("prompt", "x") is None else harmless
    assert run_script("sample", "from_image=hostile.png", "device=cpu") == (0 if harmless else 2)
    said = capsys.readouterr().err
    assert "Traceback" not in said and ("error: " in said) != bool(harmless)
    assert not (place / "elsewhere").exists()
    assert len(list(place.glob("samples/*.png"))) == bool(harmless)


# -------------------------------------------------------------------------------------------------- real processes


def test_finished_pictures_are_there_after_an_interruption(model, place):
    command = [sys.executable, str(ROOT / "sample.py"), f"ckpt={model}", PROMPT, "num_images=100000", "batch_size=2"]
    process = subprocess.Popen([*command, "steps=20", "out=out"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(Path("out").glob("*.png"))) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    paths = sorted(Path("out").iterdir())
    assert len(paths) >= 4 and all(path.suffix == ".png" for path in paths)
    for i, path in enumerate(paths):
        assert pixels(path).shape == (16, 16, 3) and read_settings(path)["seed"] == i


def test_progress_goes_to_a_terminal_only(model, place):
    environment = {**os.environ, "COLUMNS": "100"}
    command = [sys.executable, str(ROOT / "sample.py"), f"ckpt={model}", PROMPT, "steps=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("1 pictures in ")
