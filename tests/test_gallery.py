import json
import os
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError
from ldm.gallery import SAMPLER_NAMES, grid, parameters, read_settings, save_png, slug

ANY_TEXT = st.text(st.characters(), max_size=200)  # lone surrogates too: the command line makes them of bad bytes
TEXT = st.text(max_size=200)


def pixels(height=6, width=8, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


# ------------------------------------------------------------------------------------------------------------ names


@settings(max_examples=500, deadline=None)
@given(ANY_TEXT, st.integers(1, 60))
def test_any_text_gives_a_safe_short_name(text, most):
    name = slug(text, most)
    assert name
    assert len(name.encode()) <= max(most, len("picture"))
    assert not set(name) & set("/\\:*?\"<>|.' \n\t\r\0~$`&;#%=")
    assert not name.startswith("-") and not name.endswith("-")
    assert name == "picture" or all(
        character.isalnum() or character == "-" or ord(character) > 127 for character in name
    )
    assert os.path.basename(name) == name


@settings(max_examples=50, deadline=None)
@given(TEXT)
def test_a_file_can_be_called_so(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / f"0000-18446744073709551615-{slug(text)}.png"
    path.touch()
    assert path.exists()
    path.unlink()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a large red circle", "a-large-red-circle"),
        ("Pok\u00e9mon", "pokémon"),
        ("Poke\u0301mon", "pokémon"),
        ("../../etc/passwd", "etc-passwd"),
        ("a_b  c\nd", "a-b-c-d"),
        ("日本", "日本"),
        ("", "picture"),
        ("/..", "picture"),
        ("🙂", "picture"),
        ("$(rm -rf ~); `x` && y", "rm-rf-x-y"),
        ("word " * 30, "word-word-word-word-word-word-word-word"),
        ("é" * 30, "é" * 20),
        ("日" * 30, "日" * 13),
    ],
)
def test_names_are_readable(text, name):
    assert slug(text) == name


# -------------------------------------------------------------------------------------------------------- pictures


@settings(max_examples=100, deadline=None)
@given(
    prompt=TEXT, negative=TEXT, seed=st.integers(0, 2**64 - 1), scale=st.floats(allow_nan=False, allow_infinity=False)
)
def test_settings_come_back_out_of_the_file(tmp_path_factory, prompt, negative, seed, scale):
    path = tmp_path_factory.getbasetemp() / "settings.png"
    values = {"prompt": prompt, "negative_prompt": negative, "seed": seed, "guidance_scale": scale}
    save_png(path, pixels(), values)
    with Image.open(path) as image:
        image.load()
        assert image.text["parameters"].startswith(prompt)
        assert json.loads(image.text["ldm"]) == values
        assert np.array_equal(np.asarray(image), pixels())
    assert read_settings(path) == values


def test_a_picture_without_settings(tmp_path):
    save_png(tmp_path / "a.png", pixels())
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "RGB" and not image.text and np.array_equal(np.asarray(image), pixels())


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_grey_and_transparent_pictures_keep_their_channels_and_settings(tmp_path, channels, mode):
    given_pixels = pixels(channels=channels)
    save_png(tmp_path / "a.png", given_pixels, {"seed": 3})
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == mode
        assert np.array_equal(np.asarray(image).reshape(given_pixels.shape), given_pixels)
    assert read_settings(tmp_path / "a.png") == {"seed": 3}


def test_long_prompts_fit(tmp_path):
    prompt = "日本 \n" * 20_000
    save_png(tmp_path / "a.png", pixels(), {"prompt": prompt})
    with Image.open(tmp_path / "a.png") as image:
        assert image.text["parameters"].startswith(prompt)


def read_as_other_tools_do(text):
    """Take a `parameters` text apart as the Stable Diffusion web UI does: the last line holds the settings."""
    *lines, last = text.strip().split("\n")
    pairs = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    at = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[at:]).removeprefix("Negative prompt:").strip()
    values = {name: json.loads(value) if value.startswith('"') else value for name, value in pairs}
    return {"prompt": "\n".join(lines[:at]), "negative": negative, **values}


def test_other_tools_read_the_parameters():
    values = {
        "prompt": "a large, red circle", "negative_prompt": "blue: small", "steps": 20, "sampler": "dpmpp_2m",
        "spacing": "karras", "guidance_scale": 7.5, "seed": 2**64 - 1, "size": [512, 768], "model_hash": "0123456789ab",
        "model": "my, model: two", "strength": 0.6, "clip_skip": 1, "ldm_version": "0.1.0",
    }  # fmt: skip
    assert read_as_other_tools_do(parameters(values)) == {
        "prompt": "a large, red circle", "negative": "blue: small", "Steps": "20", "Sampler": "DPM++ 2M",
        "Schedule type": "Karras", "CFG scale": "7.5", "Seed": str(2**64 - 1), "Size": "512x768",
        "Model hash": "0123456789", "Model": "my, model: two", "Denoising strength": "0.6", "Clip skip": "2",
        "Version": "ldm 0.1.0",
    }  # fmt: skip


def test_every_sampler_has_the_name_that_other_tools_give_it():
    assert set(SAMPLER_NAMES) == set(SAMPLERS)


def test_files_without_settings_say_so(tmp_path):
    save_png(tmp_path / "plain.png", pixels())
    Image.fromarray(pixels()).save(tmp_path / "photo.jpg")
    (tmp_path / "text.png").write_text("no picture")
    for name, says in (
        ("plain.png", "carries no settings"), ("photo.jpg", "carries no settings"),
        ("text.png", "cannot be read"), ("gone.png", "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"{name}.*{says}"):
            read_settings(tmp_path / name)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "null", '"a"', ""])
def test_settings_that_are_none_are_refused(tmp_path, text):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("ldm", text)
    Image.fromarray(pixels()).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(UserError, match=r"a\.png"):
        read_settings(tmp_path / "a.png")


def test_a_picture_replaces_the_old_one_whole_or_not_at_all(tmp_path, monkeypatch):
    save_png(tmp_path / "a.png", pixels(seed=0))
    save_png(tmp_path / "a.png", pixels(seed=1))
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(TypeError):
        save_png(tmp_path / "a.png", pixels(), {"prompt": "x", "device": object()})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_png(tmp_path / "a.png", pixels())
    assert (tmp_path / "a.png").read_bytes() == before


# ------------------------------------------------------------------------------------------------------------ grids


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 10),
    columns=st.none() | st.integers(1, 12),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    scale=st.integers(1, 3),
)
def test_a_grid_holds_every_picture_in_its_place(num, columns, height, width, scale):
    images = [pixels(height, width, seed) for seed in range(num)]
    found = grid(images, columns, scale=scale)
    across = min(num, columns or int(np.ceil(np.sqrt(num))))
    down = -(-num // across)
    assert found.shape == (down * (height * scale + 4) + 4, across * (width * scale + 4) + 4, 3)
    assert found.dtype == np.uint8
    for i, image in enumerate(images):
        top, left = 4 + i // across * (height * scale + 4), 4 + i % across * (width * scale + 4)
        window = found[top : top + height * scale, left : left + width * scale]
        assert np.array_equal(window, image.repeat(scale, axis=0).repeat(scale, axis=1))


@pytest.mark.parametrize("captions", [(), ("a red circle",) * 3])
def test_a_grid_of_grey_pictures_is_grey_and_of_transparent_ones_shows_white(captions):
    grey = [pixels(20, 60, seed, channels=1) for seed in range(3)]
    assert np.array_equal(grid(grey, captions=captions), grid([g.repeat(3, axis=-1) for g in grey], captions=captions))
    clear = np.zeros((20, 60, 4), np.uint8)
    clear[:, 30:] = (255, 0, 0, 255)
    found = grid([clear] * 3, captions=captions, scale=2)
    assert found.shape == grid([clear[..., :3]] * 3, captions=captions, scale=2).shape
    assert (found[4:44, 4:64] == 255).all() and (found[4:44, 64:124] == (255, 0, 0)).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=4))
def test_captions_of_any_text_can_be_written(captions):
    images = [np.zeros((32, 64, 3), np.uint8)] * len(captions)
    found = grid(images, captions=captions)
    assert found.shape[1] == grid(images).shape[1]
    assert found.shape[0] >= grid(images).shape[0]


def test_captions_stand_below_their_pictures():
    images = [np.full((20, 200, 3), 99, np.uint8)] * 2
    found = grid(images, columns=1, captions=["a red circle", ""])
    assert found.shape[0] == grid(images, columns=1).shape[0] + 2 * 14
    assert (found[4:24, 4:204] == 99).all()
    assert (found[24:38] == 0).any() and not (found[66:] != 255).any()


def test_long_captions_are_wrapped_into_their_column():
    images = [np.full((20, 60, 3), 99, np.uint8)] * 2
    found = grid(images, columns=2, captions=["a red circle above a blue square on green", ""])
    assert found.shape[0] > 28 + 2 * 14
    right_of_the_first = found[24:, 4 + 60 + 4 :]
    assert (right_of_the_first == 255).all()


@pytest.mark.parametrize(
    "word", ["supercalifragilisticexpialidocious" * 3, "日本語" * 20, "a " + "é" * 40], ids=["latin", "cjk", "accents"]
)
def test_a_word_that_is_too_long_is_broken(word):
    images = [np.full((20, 60, 3), 99, np.uint8)] * 2
    found = grid(images, columns=2, captions=[word, ""])
    assert (found[24:, 4 + 60 + 4 :] == 255).all()
