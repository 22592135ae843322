import io
import re
import struct
import warnings
import zlib
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from ldm.data.images import (
    MOST_PIXELS,
    decode,
    examine,
    scale_and_crop,
    to_channels,
    to_pil,
    to_pixels,
    to_tensor,
)
from ldm.errors import UserError

HIDDEN, RED, WHITE = (0, 255, 0), (255, 0, 0), (255, 255, 255)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def noise(height=20, width=30, seed=0, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(height=120, width=180, seed=0):
    """A picture with large shapes, which survives JPEG."""
    return Image.fromarray(noise(6, 9, seed)).resize((width, height), Image.Resampling.BICUBIC)


def refusal(function, *arguments):
    """Return why a picture was refused, or "" where it was not."""
    try:
        function(*arguments)
    except UserError as error:
        return str(error)
    return ""


def half_transparent():
    """The left half opaque red, the right half transparent over a hidden green."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = (*RED, 255)
    pixels[:, 4:] = (*HIDDEN, 0)
    return Image.fromarray(pixels)


def test_pixels_of_a_png_are_kept_to_the_bit():
    pixels = noise()
    assert np.array_equal(decode(encoded(Image.fromarray(pixels))), pixels)


def test_bytes_a_path_and_an_opened_picture_give_the_same(tmp_path):
    pixels = noise()
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    for given_as in (path.read_bytes(), path, str(path), Image.open(path)):
        assert np.array_equal(decode(given_as), pixels)


def test_result_is_writable_and_turns_to_a_tensor_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = encoded(Image.fromarray(noise()))
        for channels in (1, 3, 4):
            pixels = decode(data, channels=channels)
            for given_out in (pixels, scale_and_crop(pixels, 8, 8), scale_and_crop(pixels, 20, 20, mirrored=True)):
                assert given_out.flags.writeable
                to_tensor(given_out)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    grey = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    found = decode(encoded(Image.fromarray(grey), kind))
    assert np.abs(found.astype(int) - np.round(grey / 257)[..., None].astype(int)).max() == 0


def test_a_dark_16_bit_picture_stays_dark():
    grey = np.full((4, 4), 2570, np.uint16)
    assert (decode(encoded(Image.fromarray(grey))) == 10).all()


@pytest.mark.parametrize("mode", ["I;16B", "I;16L", "I;16", "I"])
def test_every_16_bit_mode(mode):
    image = Image.fromarray(np.array([[0, 32896, 65535]], np.int32)).convert(mode)
    assert decode(image)[0, :, 0].tolist() == [0, 128, 255]


def png(width, bits, colour_type, row, *more):
    """Write a PNG of one row, of kinds that Pillow reads and does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0))
    image = chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")  # a row begins with its filter, 0
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*each) for each in more) + image


def test_16_bit_colour():
    data = png(2, 16, 2, struct.pack(">6H", 65535, 32896, 0, 257, 514, 771))
    assert decode(data).tolist() == [[[255, 128, 0], [1, 2, 3]]]


def test_16_bit_grey_with_a_transparent_value():
    data = png(2, 16, 0, struct.pack(">2H", 32896, 257), (b"tRNS", struct.pack(">H", 257)))
    assert decode(data).tolist() == [[[128] * 3, [255] * 3]]
    assert decode(data, channels=4).tolist() == [[[128, 128, 128, 255], [1, 1, 1, 0]]]
    assert decode(data, background=(0, 0, 0), channels=1).tolist() == [[[128], [0]]]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 255), (-1, 1), (0, 1e9)], ids=["unit", "8 bits", "signed", "wide"]
)
def test_float_grey_fills_the_range(low, high):
    grey = np.linspace(low, high, 64, dtype=np.float32).reshape(8, 8)
    found = decode(encoded(Image.fromarray(grey), "TIFF"))[..., 0]
    assert found.min() == 0 and found.max() == 255
    assert (np.diff(found.flatten().astype(int)) >= 0).all()


def test_a_dark_float_picture_stays_dark_and_gaps_are_black():
    grey = np.full((4, 4), 0.2, np.float32)
    grey[0, 0] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(encoded(Image.fromarray(grey), "TIFF"))
    assert found[1, 1, 0] == 51 and found[0, 0, 0] == 0


def test_transparency_shows_the_background_not_hidden_colour():
    data = encoded(half_transparent())
    found = decode(data)
    assert tuple(found[0, 0]) == RED and tuple(found[0, 7]) == WHITE
    assert tuple(decode(data, background=(1, 2, 3))[0, 7]) == (1, 2, 3)


def test_half_opacity_blends():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 128))
    assert decode(encoded(image))[0, 0].tolist() == pytest.approx([127] * 3, abs=1)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_palette_and_other_transparency(kind):
    image = half_transparent()
    if kind == "PNG":
        image = image.quantize(16)
    found = decode(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert tuple(found[0, 0]) == RED and tuple(found[0, 7]) == WHITE


def test_transparent_index_of_a_palette():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([*HIDDEN, *RED])
    image.paste(1, (0, 0, 2, 4))
    found = decode(encoded(image, transparency=0))
    assert tuple(found[0, 0]) == RED and tuple(found[0, 3]) == WHITE


def test_transparent_colour_of_rgb_and_of_grey():
    rgb, grey = Image.new("RGB", (4, 4), HIDDEN), Image.new("L", (4, 4), 7)
    rgb.paste(RED, (0, 0, 2, 4))
    assert [tuple(p) for p in decode(encoded(rgb, transparency=HIDDEN))[0, [0, 3]]] == [RED, WHITE]
    assert tuple(decode(encoded(grey, transparency=7))[0, 0]) == WHITE


def test_grey_with_alpha():
    image = Image.fromarray(np.array([[[50, 255], [50, 0]]], np.uint8), "LA")
    assert decode(encoded(image)).tolist() == [[[50] * 3, [255] * 3]]


def test_one_bit():
    image = Image.fromarray(np.array([[True, False]]))
    assert image.mode == "1"
    assert decode(encoded(image)).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk(kind):
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    found = decode(encoded(image, kind))[4, 4].astype(int)
    assert found[0] > 200 and found[1:].max() < 60


# EXIF 2.32, table 6: which side of what is seen the stored first row and first column are.
ORIENTATIONS = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],
    7: lambda stored: stored.swapaxes(0, 1)[::-1, ::-1],
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_turns_the_picture(kind, orientation):
    stored = np.zeros((160, 320, 3), np.uint8)
    stored[:80, :80] = 255  # a white corner, top left, and a grey one beside it
    stored[:80, 240:] = 128
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(stored), kind, exif=exif)
    meant = ORIENTATIONS[orientation](stored)
    for channels in (1, 3, 4):
        found = decode(data, channels=channels)
        assert found.shape == (*meant.shape[:2], channels)
        assert np.abs(found[..., :3].astype(int) - meant[..., :channels][..., :3]).mean() < 2
    assert examine(data)[:2] == (meant.shape[1], meant.shape[0])
    smaller = decode(data, at_least=40)
    assert smaller.shape[0] * meant.shape[1] == smaller.shape[1] * meant.shape[0]
    assert np.abs(scale_and_crop(smaller, 64, 64).astype(int) - scale_and_crop(meant, 64, 64)).mean() < 4


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_does_not_cost_the_picture(kind, exif):
    data = encoded(Image.fromarray(noise()), kind, exif=exif)
    assert decode(data).shape == (20, 30, 3) and examine(data)[:2] == (30, 20)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, (0, 0, 255))]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    assert np.abs(decode(data)[4, 4].astype(int) - RED).max() < 4


NO_PICTURES = {
    "empty": (b"", "the file is empty, 0 bytes"),
    "html": (b"\r\n<!DOCTYPE html><html>404</html>", "an HTML page saved as a picture; download"),
    "html without doctype": (b"\xef\xbb\xbf<HTML lang=en>", "an HTML page saved as a picture; download"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing or other XML, which holds no pixels"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run `git lfs pull`"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript or PDF, which hold no pixels"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, which Pillow does not read"),
    "zeros": (bytes(100), "of no known format, or damaged in its first bytes"),
    "text": (b"text", "of no known format, or damaged in its first bytes"),
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_what_is_no_picture_is_refused_with_what_it_is(name, tmp_path):
    content, reason = NO_PICTURES[name]
    (tmp_path / "a.jpg").write_bytes(content)
    for function, given_as in ((decode, content), (decode, tmp_path / "a.jpg"), (examine, content)):
        told = refusal(function, given_as)
        assert told.startswith("not a picture: ") and reason in told


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_truncated_picture_is_refused(kind):
    data = encoded(Image.fromarray(noise(64, 64)), kind)[:-2000]
    assert refusal(decode, data).startswith("not a readable picture: ")
    assert refusal(examine, data).startswith("not a readable picture: ")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "nothing.png", tmp_path):
        with pytest.raises(UserError, match="not a readable picture"):
            decode(path)


@pytest.mark.parametrize("side", [10_000, 14_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused(side):
    """Pillow itself only warns of the smaller one."""
    data = encoded(Image.new("1", (side, side)))
    assert len(data) < 100_000
    for function in (decode, examine):
        told = refusal(function, data)
        assert "decompression bomb" in told and re.search(rf"{side**2:,}|{side**2}", told)


def test_the_largest_pictures_that_are_taken(monkeypatch):
    monkeypatch.setattr("ldm.data.images.MOST_PIXELS", 600)
    assert decode(encoded(Image.fromarray(noise(20, 30)))).shape == (20, 30, 3)
    told = refusal(decode, encoded(Image.fromarray(noise(20, 31))))
    assert "31x20 are 620 pixels, and more than 600" in told
    assert refusal(decode, Image.fromarray(noise(20, 31))) == told
    assert MOST_PIXELS > 9_000**2


def test_reasons_are_one_line_and_never_empty(monkeypatch):
    for error, reason in ((EOFError(), "EOFError"), (OSError("bad\n\tfile"), "bad file")):
        monkeypatch.setattr(Image, "open", Mock(side_effect=error))
        assert refusal(decode, b"x") == f"not a readable picture: {reason}"


# --------------------------------------------------------------------------------------------------------- channels


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "I", "F"]
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_mode_gives_every_number_of_channels(mode, channels):
    image = Image.new("RGB", (4, 4), (200, 30, 90)).convert(mode)
    found = decode(image, channels=channels)
    assert found.shape == (4, 4, channels) and found.dtype == np.uint8
    assert np.array_equal(found, to_channels(decode(image, channels=4), channels))


def test_one_channel_is_luminance_over_the_background():
    image = encoded(Image.fromarray(noise()))
    assert np.array_equal(decode(image, channels=1)[..., 0], np.asarray(Image.fromarray(noise()).convert("L")))
    assert decode(encoded(half_transparent()), (10, 10, 10), channels=1)[0, [0, 7], 0].tolist() == [76, 10]


def test_four_channels_keep_transparency_and_hidden_colour():
    data = encoded(half_transparent())
    assert decode(data, channels=4)[0, [0, 7]].tolist() == [[*RED, 255], [*HIDDEN, 0]]
    opaque = decode(encoded(Image.fromarray(noise())), channels=4)
    assert np.array_equal(opaque[..., :3], noise()) and (opaque[..., 3] == 255).all()


@pytest.mark.parametrize("channels", [0, 2, 5])
def test_other_numbers_of_channels_are_a_mistake_of_the_caller_not_of_the_file(channels):
    with pytest.raises(ValueError, match=f"channels={channels}: pictures have 1"):
        decode(encoded(Image.fromarray(noise())), channels=channels)


@pytest.mark.parametrize("old", [1, 3, 4])
@pytest.mark.parametrize("new", [1, 3, 4])
def test_drawn_pictures_change_channels_as_decoded_ones_do(old, new):
    pixels = noise(channels=old)
    found = to_channels(pixels, new, background=(9, 99, 199))
    assert np.array_equal(found, decode(encoded(to_pil(pixels)), (9, 99, 199), new))
    assert (found is pixels) == (old == new)


# --------------------------------------------------------------------------------------------------------- profiles


def icc(space, **tags):
    """Write a small ICC profile (ICC.1:2001-04, §6)."""
    table, contents = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name.encode() + struct.pack(">II", 128 + 4 + 12 * len(tags) + len(contents), len(content))
        contents += content + bytes(-len(content) % 4)
    pcs = b"Lab " if "A2B0" in tags else b"XYZ "
    header = struct.pack(">8xI4s4s4s12x4s", 0x02400000, b"mntr", space.encode(), pcs, b"acsp")
    header = header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)  # D50
    body = header.ljust(128, b"\0") + table + contents
    return struct.pack(">I", len(body)) + body[4:]


def curve(gamma=None):
    """A power, or the curve of sRGB by a table."""
    if gamma is not None:
        return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    v = np.linspace(0, 1, 1024)
    linear = np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    return b"curv\0\0\0\0" + struct.pack(">I", 1024) + np.round(linear * 65535).astype(">u2").tobytes()


def xyz(*values):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in values))


PRIMARIES = {
    "r": xyz(0.43607, 0.22249, 0.01392),
    "g": xyz(0.38515, 0.71687, 0.09708),
    "b": xyz(0.14307, 0.06061, 0.7141),
}


def rgb_profile(primaries="rgb", gamma=None):
    """sRGB, or something like it with its primaries called by other names and another curve."""
    tags = {f"{name}XYZ": PRIMARIES[colour] for name, colour in zip("rgb", primaries, strict=True)}
    return icc("RGB ", wtpt=xyz(0.9642, 1, 0.8249), **tags, **{f"{name}TRC": curve(gamma) for name in "rgb"})


def ink_profile():
    """Inks of which only black is seen."""
    tables = bytes(range(256))
    cells = b"".join(bytes([255 * (1 - (i & 1)), 128, 128]) for i in range(16))  # black is the last ink
    matrix = struct.pack(">9i", *np.eye(3, dtype=int).flatten().tolist())
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + tables * 4 + cells + tables * 3
    return icc("CMYK", wtpt=xyz(0.9642, 1, 0.8249), A2B0=lut)


SRGB = {
    "Pillow's": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    "by a table": rgb_profile(),
}


@pytest.mark.parametrize("name", SRGB)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_an_srgb_profile_changes_nothing(name, kind):
    image = Image.fromarray(noise())
    assert np.array_equal(decode(encoded(image, kind, icc_profile=SRGB[name])), decode(encoded(image, kind)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_colours_are_seen_through_their_profile(kind):
    """The test picture of browsers: stored red, seen green."""
    data = encoded(Image.new("RGB", (16, 16), RED), kind, icc_profile=rgb_profile("gbr"))
    assert np.abs(decode(data)[8, 8].astype(int) - (0, 255, 0)).max() < 8
    assert np.abs(decode(data, channels=4)[8, 8].astype(int) - (0, 255, 0, 255)).max() < 8
    assert abs(int(decode(data, channels=1)[8, 8, 0]) - 150) < 8


def test_profiles_hold_beside_transparency_palettes_and_rotation():
    profile = rgb_profile("gbr")
    exif = Image.Exif()
    exif[0x0112] = 3
    for image in (half_transparent(), half_transparent().quantize(16)):
        found = decode(encoded(image, icc_profile=profile, exif=exif), background=(1, 2, 3))
        assert np.abs(found[0, 7].astype(int) - (0, 255, 0)).max() < 3 and tuple(found[0, 0]) == (1, 2, 3)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_grey_through_its_profile(channels):
    profile = icc("GRAY", wtpt=xyz(0.9642, 1, 0.8249), kTRC=curve(1.0))  # linear light
    data = encoded(Image.new("L", (4, 4), 128), icc_profile=profile)
    assert decode(data, channels=channels)[0, 0].tolist() == pytest.approx(
        [188, 188, 188, 255][:channels] if channels != 1 else [188], abs=1
    )
    plain = icc("GRAY", wtpt=xyz(0.9642, 1, 0.8249), kTRC=curve())
    assert (decode(encoded(Image.new("L", (4, 4), 128), icc_profile=plain), channels=channels)[0, 0, 0]) == 128


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_inks_through_their_profile(kind):
    inks = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    assert decode(encoded(inks, kind))[8, 8, 0] < 20
    assert decode(encoded(inks, kind, icc_profile=ink_profile()))[8, 8].tolist() == pytest.approx([255] * 3, abs=3)


BROKEN = {
    "nothing": b" ",
    "zeros": bytes(300),
    "cut": rgb_profile("gbr")[:200],
    "of grey": icc("GRAY", wtpt=xyz(0.9642, 1, 0.8249), kTRC=curve(1.0)),
    "of inks": ink_profile(),
    "without curves": icc("RGB ", wtpt=xyz(0.9642, 1, 0.8249)),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_profile_that_is_broken_or_for_other_colours_is_passed_over(name, kind):
    image = Image.fromarray(noise())
    assert np.array_equal(decode(encoded(image, kind, icc_profile=BROKEN[name])), decode(encoded(image, kind)))


@pytest.mark.parametrize("profile", [rgb_profile("gbr"), ink_profile()], ids=["of RGB", "of inks"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "I;16"])
def test_a_grey_picture_with_a_profile_of_colours_is_as_without(mode, profile):
    grey = Image.fromarray(noise()).convert("L")
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    found = decode(encoded(image, icc_profile=profile), channels=1)
    assert np.array_equal(found, decode(encoded(image), channels=1))


# ----------------------------------------------------------------------------------------------- smaller and cheaper


@pytest.mark.parametrize(
    ("at_least", "size"),
    [
        (0, (400, 300)),
        (300, (400, 300)),
        (151, (400, 300)),
        (150, (200, 150)),
        (75, (100, 75)),
        (1, (50, 38)),
        (999, (400, 300)),
    ],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_is_decoded_as_small_as_allowed(at_least, size, mode):
    image = smooth(300, 400).convert(mode)
    found = decode(encoded(image, "JPEG", quality=95), at_least=at_least)
    assert found.shape == (size[1], size[0], 3)
    meant = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX))
    assert np.abs(found.astype(int) - meant).mean() < 4


@given(width=st.integers(1, 300), height=st.integers(1, 300), at_least=st.integers(1, 300))
@settings(deadline=None, max_examples=60)
def test_no_side_gets_smaller_than_asked_or_than_it_is(width, height, at_least):
    found = decode(encoded(Image.new("RGB", (width, height)), "JPEG"), at_least=at_least)
    assert found.shape[0] >= min(at_least, height) and found.shape[1] >= min(at_least, width)


def test_other_formats_are_decoded_whole():
    for kind in ("PNG", "WEBP", "TIFF"):
        assert decode(encoded(smooth(), kind), at_least=8).shape == (120, 180, 3)


def bits(one, other):
    return (examine(one).likeness ^ examine(other).likeness).bit_count()


def test_pictures_that_look_alike_have_like_hashes_and_others_do_not():
    pictures = [smooth(240, 360, seed) for seed in range(6)]
    for picture in pictures:
        data = encoded(picture)
        copies = [encoded(picture, "JPEG", quality=quality) for quality in (95, 50)]
        copies += [encoded(picture.resize((width, width * 2 // 3)), "JPEG", quality=95) for width in (120, 48)]
        copies += [encoded(picture, "WEBP"), encoded(picture.quantize(64))]
        assert bits(data, encoded(picture, "TIFF")) == 0 and max(bits(data, copy) for copy in copies) <= 8
    apart = [bits(encoded(a), encoded(b)) for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(apart) > 16


def test_likeness_is_whether_grey_rises_to_the_right():
    rising = np.broadcast_to(np.arange(0, 90, 10, dtype=np.uint8), (8, 9))
    assert examine(encoded(Image.fromarray(rising))).likeness == 2**64 - 1
    assert examine(encoded(Image.fromarray(rising[:, ::-1].copy()))).likeness == 0
    first = np.where(np.arange(8)[:, None] == 0, rising, 0).astype(np.uint8)
    assert examine(encoded(Image.fromarray(first))).likeness == 0xFF << 56


def test_likeness_is_of_what_is_seen():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = smooth().transpose(Image.Transpose.ROTATE_270)
    assert bits(encoded(smooth(), "JPEG", exif=exif), encoded(turned, "JPEG")) <= 2
    assert bits(encoded(half_transparent()), encoded(Image.fromarray(decode(encoded(half_transparent()))))) == 0


def test_a_picture_of_one_pixel():
    assert examine(encoded(Image.new("RGB", (1, 1)))) == (1, 1, 0)
    assert examine(encoded(Image.new("RGB", (1, 1)), "JPEG")) == (1, 1, 0)


def test_a_jpeg_of_several_pictures_gives_the_first():
    data = encoded(Image.new("RGB", (64, 32), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (64, 32))])
    assert examine(data)[:2] == (64, 32)
    assert np.abs(decode(data, at_least=16)[0, 0].astype(int) - RED).max() < 4


KINDS = """
PNG RGB, PNG P, PNG RGBA, PNG LA, PNG 1, PNG I;16, JPEG RGB, JPEG L, JPEG CMYK, GIF P, WEBP RGB, WEBP RGBA, BMP RGB,
TIFF RGB, TIFF F, TIFF CMYK, AVIF RGB, JPEG2000 RGB, ICO RGBA, PPM RGB
"""
SAMPLES = [
    encoded(Image.fromarray(noise(16, 24)).convert("L" if mode == "I;16" else mode).convert(mode), kind)
    for kind, mode in (each.split() for each in KINDS.split(","))
]
# Large enough for every scale at which a JPEG is decoded.
SAMPLES += [encoded(smooth(130, 160), "JPEG", **more) for more in ({}, {"progressive": True}, {"keep_rgb": True})]
SAMPLES += [encoded(smooth(130, 160), "JPEG", icc_profile=rgb_profile("gbr"), restart_marker_rows=1)]


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), sample=st.sampled_from(SAMPLES))
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_give_a_picture_or_a_clear_refusal_and_examining_finds_the_same(sample, data):
    damaged = bytearray(sample)
    for _ in range(data.draw(st.integers(0, 4))):
        damaged[data.draw(st.integers(0, len(sample) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(damaged[: data.draw(st.integers(0, len(sample)))] if data.draw(st.booleans()) else damaged)
    told = refusal(examine, damaged)
    channels, at_least = data.draw(st.sampled_from([1, 3, 4])), data.draw(st.sampled_from([0, 16, 64]))
    assert bool(refusal(decode, damaged, WHITE, channels, at_least)) == bool(told)
    if told:
        assert told.startswith(("not a picture: ", "not a readable picture: ")) and "\n" not in told
        return
    pixels = decode(damaged, channels=channels)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3
    assert pixels.shape == (examine(damaged).height, examine(damaged).width, channels)


# -------------------------------------------------------------------------------------------------- scale and crop


@given(
    shape=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    resolution=st.integers(1, 80),
    channels=st.sampled_from([1, 3, 4]),
)
@settings(deadline=None, max_examples=200)
def test_the_centre_square_is_that_of_imageops_to_the_bit(shape, resolution, channels):
    pixels = noise(*shape, channels=channels)
    pixels[..., 3:] = 255  # Pillow rounds colours by their alpha, where we take whole pixels too
    fitted = np.asarray(ImageOps.fit(to_pil(pixels), (resolution, resolution), Image.Resampling.LANCZOS))
    found = scale_and_crop(pixels, resolution, resolution)
    assert np.array_equal(found, fitted.reshape(found.shape)) and found.shape == (resolution, resolution, channels)


@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    mirrored=st.booleans(),
    channels=st.sampled_from([1, 3, 4]),
)
@settings(deadline=None, max_examples=100)
def test_any_size_at_any_place(shape, size, place, mirrored, channels):
    pixels = noise(*shape, channels=channels)
    before = pixels.copy()
    found = scale_and_crop(pixels, *size, place, mirrored)
    assert found.shape == (size[1], size[0], channels) and found.dtype == np.uint8
    assert np.array_equal(pixels, before) and found.flags.c_contiguous
    assert np.array_equal(found[:, ::-1], scale_and_crop(pixels, *size, place, not mirrored))


def test_place_says_where_the_cut_lies():
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64], wide[:, 64:] = 100, 200
    for side in (32, 16):
        found = [scale_and_crop(wide, side, side, (x, 0.3))[side // 2, side // 2, 0] for x in (0, 0.5, 1)]
        assert found == [0, 100, 200]
        tall = wide.swapaxes(0, 1)
        assert [scale_and_crop(tall, side, side, (0.3, y))[side // 2, side // 2, 0] for y in (0, 0.5, 1)] == found


def test_a_cut_without_scaling_takes_whole_pixels():
    pixels = noise(20, 30)
    assert np.array_equal(scale_and_crop(pixels, 20, 20), pixels[:, 5:25])
    assert np.array_equal(scale_and_crop(pixels, 20, 20, (0.2, 0), mirrored=True), pixels[:, 2:22][:, ::-1])


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_right_size_is_left_alone(channels):
    pixels = noise(16, 24, channels=channels)
    assert scale_and_crop(pixels, 24, 16) is pixels


def test_nothing_is_squeezed():
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    assert (scale_and_crop(wide, 32, 32) == 255).all()
    assert scale_and_crop(wide, 16, 16)[8, 8, 0] == 255
    assert (scale_and_crop(wide.swapaxes(0, 1), 32, 32) == 255).all()
    whole = scale_and_crop(wide, 48, 16)
    assert whole[8, 24, 0] == 255 and whole[8, 8, 0] == whole[8, 40, 0] == 0


def test_hidden_colour_does_not_shine_through():
    pixels = np.asarray(half_transparent().resize((64, 64), Image.Resampling.NEAREST))
    found = scale_and_crop(pixels, 20, 20)
    assert (found[found[..., 3] > 8][:, 1] < 10).all()


def test_downscaling_is_antialiased():
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[:, ::2] = 255
    found = scale_and_crop(lines, 16, 16)[:, 2:-2].astype(int)
    assert np.abs(found - 127).max() < 12


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tensor_and_pixels_are_inverse_for_every_value(channels):
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(channels, axis=-1)
    image = to_tensor(pixels)
    assert image.dtype == torch.float32 and image.shape == (1, channels, 16, 16)
    assert image.min() == -1 and image.max() == 1
    assert np.array_equal(to_pixels(image), pixels)
    assert np.array_equal(to_pixels(to_tensor(pixels[0])), pixels[0])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pillow_pictures_of_every_number_of_channels(channels, mode):
    pixels = noise(channels=channels)
    image = to_pil(pixels)
    assert image.mode == mode and image.size == (30, 20)
    assert np.array_equal(decode(image, channels=channels), pixels)


def test_channels_go_first_and_stay_in_order():
    image = to_tensor(np.array([[[255, 0, 127]]], np.uint8))
    assert image[:, 0, 0].tolist() == pytest.approx([1, -1, -1 / 255])


def test_pixels_of_half_precision_and_out_of_range():
    image = torch.tensor([-2.0, 0.0, 7.0], dtype=torch.bfloat16, requires_grad=True).reshape(3, 1, 1)
    assert to_pixels(image).tolist() == [[[0, 128, 255]]]


def test_bytes_are_not_changed_by_turning_them_to_a_tensor():
    pixels = noise()
    before = pixels.copy()
    to_tensor(pixels)
    assert np.array_equal(pixels, before)
