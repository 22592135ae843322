import io
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.canvas import (
    Canvas,
    composite,
    distance,
    latent_mask,
    make_canvas,
    masked_image,
    own_size,
    parse_outpaint,
    wanted_size,
)
from ldm.data.images import decode, to_channels, to_pixels, to_tensor
from ldm.errors import UserError

MODEL = {"factor": 8, "default_size": 64}
FREE = {**MODEL, "height": None, "width": None}


def picture(height=64, width=64, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def stripe(height=64, width=64, left=16, right=48):
    """A mask that is white between two columns."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, left:right] = 255
    return mask


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------- reading


def test_every_form_of_a_picture_gives_the_same(tmp_path):
    pixels, mask = picture(), stripe()
    path, mask_path = tmp_path / "a.png", tmp_path / "m.png"
    path.write_bytes(encoded(pixels))
    mask_path.write_bytes(encoded(mask))
    forms = [str(path), path, path.read_bytes(), Image.open(path), pixels]
    masks = [str(mask_path), mask_path, mask_path.read_bytes(), Image.open(mask_path), mask]
    for image, white in zip(forms, masks, strict=True):
        canvas = make_canvas(image, white, **FREE)
        assert np.array_equal(canvas.pixels, pixels)
        assert canvas.mask.dtype == np.float32 and np.array_equal(canvas.mask, mask / np.float32(255))


def rotated_jpeg():
    """Stored upright and 64 wide; its EXIF turns it by 90 degrees, so that its white left half comes to the top."""
    stored = np.zeros((96, 64, 3), np.uint8)
    stored[:, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(stored, "JPEG", exif=exif)


def test_a_jpeg_is_turned_as_its_exif_says_and_so_is_a_mask():
    canvas = make_canvas(rotated_jpeg(), rotated_jpeg(), **FREE)
    assert canvas.pixels.shape == (64, 96, 3)
    assert canvas.pixels[4, 48].min() > 250 and canvas.pixels[60, 48].max() < 5
    assert canvas.mask[4].min() > 0.98 and canvas.mask[60].max() < 0.02


FILES = {
    "16 bits": (encoded(np.full((64, 64), 25700, np.uint16)), (100, 100, 100)),
    "RGBA": (encoded(Image.new("RGBA", (64, 64), (0, 255, 0, 0))), (255, 255, 255)),
    "palette": (encoded(Image.new("RGB", (64, 64), (10, 200, 30)).quantize(4)), (10, 200, 30)),
    "grey": (encoded(Image.new("L", (64, 64), 77)), (77, 77, 77)),
    "CMYK": (encoded(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    "GIF": (
        encoded(
            Image.new("RGB", (64, 64), (255, 0, 0)),
            "GIF",
            save_all=True,
            append_images=[Image.new("RGB", (64, 64), (0, 0, 255))],
        ),
        (255, 0, 0),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_every_kind_are_seen_as_a_person_sees_them(name):
    data, colour = FILES[name]
    canvas = make_canvas(data, **FREE)
    assert np.abs(canvas.pixels.astype(int) - colour).max() <= 3


def test_a_mask_counts_by_its_grey_value():
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[:32] = (255, 0, 0)
    mask[32:, :32] = 128
    found = make_canvas(picture(), mask, **FREE).mask
    assert found[0, 0] == pytest.approx(0.299, abs=0.01)
    assert found[63, 0] == np.float32(128 / 255) and found[63, 63] == 0
    grey16 = encoded(np.full((64, 64), 25700, np.uint16))
    assert (make_canvas(picture(), grey16, **FREE).mask == np.float32(100 / 255)).all()


def layer(colour):
    """The left half in one colour, the right half transparent."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :32] = (colour, colour, colour, 255)
    return pixels


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_picture_comes_in_the_channels_of_the_model(channels):
    given_picture = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    for pixels in (given_picture, given_picture[..., :3], given_picture[..., :1], given_picture[..., 0]):
        canvas = make_canvas(pixels, stripe(), **FREE, channels=channels)
        assert np.array_equal(canvas.pixels, decode(encoded(pixels.squeeze()), channels=channels))
        assert canvas.mask.shape == (64, 64)
    scaled = make_canvas(given_picture, stripe(), **MODEL, height=32, width=48, outpaint="top:8", channels=channels)
    assert scaled.pixels.shape == (40, 48, channels) and scaled.mask.shape == (40, 48)
    assert masked_image(scaled).shape == (1, channels, 40, 48)
    assert composite(scaled, torch.zeros(channels, 40, 48)).shape == (channels, 40, 48)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_what_is_drawn_in_other_channels_is_laid_over_the_picture_in_these(channels):
    pixels = picture(16, 16)
    found = to_pixels(composite(Canvas(pixels, np.zeros((16, 16), np.float32)), torch.zeros(channels, 16, 16)))
    assert np.array_equal(found, to_channels(pixels, channels))


@pytest.mark.parametrize(("colour", "left", "right"), [(0, 0, 1), (255, 1, 0)])
def test_transparent_pixels_of_a_mask_are_the_other_colour(colour, left, right):
    found = make_canvas(picture(), layer(colour), **FREE).mask
    assert (found[:, :32] == left).all() and (found[:, 32:] == right).all()


@pytest.mark.parametrize("argument", ["init_image", "mask"])
def test_errors_say_which_argument_and_which_file(argument, tmp_path):
    html = tmp_path / "page.png"
    html.write_text("<html>")
    for wrong, message in (
        (html, rf"{argument}={re.escape(str(html))}: not a picture"),
        (tmp_path / "gone.png", rf"{argument}=.*gone.png: .*No such file"),
        (b"", rf"{argument}: not a picture"),
        (encoded(picture())[:500], rf"{argument}: not a readable picture: .*truncated"),
        (np.zeros((3, 64, 64), np.float32), rf"{argument}: an array must be uint8 .*, got float32 of shape \(3, 64"),
        (np.zeros((3, 64, 64), np.uint8), rf"{argument}: an array must be uint8 of shape"),
        (np.zeros((64, 64, 2), np.uint8), rf"{argument}: an array must be uint8 of shape .* of shape \(64, 64, 2\)"),
        (np.zeros((0, 64), np.uint8), rf"{argument}: the array is empty"),
    ):
        with pytest.raises(UserError, match=message):
            make_canvas(**{"init_image": picture(), **FREE, argument: wrong})


# ------------------------------------------------------------------------------------------------------------- size


def test_without_a_size_pixels_are_cut_and_not_scaled():
    pixels, mask = picture(75, 101), stripe(75, 101)
    canvas = make_canvas(pixels, mask, **FREE)
    assert np.array_equal(canvas.pixels, pixels[1:73, 2:98])
    assert np.array_equal(canvas.mask, mask[1:73, 2:98] / np.float32(255))


def test_a_given_size_is_covered_and_the_centre_is_cut_out():
    pixels, mask = np.zeros((100, 300, 3), np.uint8), stripe(100, 300, 100, 200)
    pixels[:, 100:200] = 200
    canvas = make_canvas(pixels, mask, **MODEL, height=48, width=48)
    assert (canvas.pixels[:, 4:-4] == 200).all() and (canvas.mask[:, 1:-1] == 1).all()
    wide = make_canvas(pixels, mask, **MODEL, height=48, width=144)
    assert wide.pixels.shape == (48, 144, 3) and wide.mask.shape == (48, 144)
    assert wide.pixels[:, :44].max() == 0 and wide.pixels[:, 52:92].min() > 195


def test_one_given_side_brings_the_other():
    assert make_canvas(picture(100, 300), **MODEL, height=64, width=None).pixels.shape == (64, 192, 3)
    assert make_canvas(picture(100, 300), **MODEL, height=None, width=64).pixels.shape == (24, 64, 3)
    assert make_canvas(picture(10, 300), **MODEL, height=None, width=64).pixels.shape == (8, 64, 3)


def test_a_resized_mask_stays_exact_away_from_its_edge():
    found = make_canvas(picture(100, 100), stripe(100, 100, 30, 70), **MODEL, height=64, width=64).mask
    assert (found[:, :18] == 0).all() and (found[:, 46:] == 0).all() and (found[:, 21:43] == 1).all()


def test_a_mask_of_the_same_proportions_is_resized():
    canvas = make_canvas(picture(64, 128), stripe(32, 64, 0, 32), **FREE)
    assert (canvas.mask[:, :62] == 1).all() and (canvas.mask[:, 66:] == 0).all()
    for shape in ((150, 203), (37, 51), (38, 50)):  # as near to the proportions as whole pixels are
        assert make_canvas(picture(75, 101), stripe(*shape), **FREE).mask.shape == (72, 96)


@pytest.mark.parametrize("shape", [(64, 66), (128, 64), (60, 64)])
def test_a_mask_of_other_proportions_is_refused(shape):
    with pytest.raises(
        UserError, match=rf"mask: it is {shape[1]} px wide and {shape[0]} high, init_image is 64 px wide"
    ):
        make_canvas(picture(), stripe(*shape), **FREE)


def test_a_mask_without_white_is_refused():
    with pytest.raises(UserError, match="mask: it is black all over; paint white"):
        make_canvas(picture(), stripe(left=0, right=0), **FREE)
    with pytest.raises(UserError, match="mask: it is black all over"):
        make_canvas(picture(), np.zeros((64, 64, 4), np.uint8), **FREE)
    lost = stripe(64, 200, 0, 10)
    with pytest.raises(UserError, match=r"mask: .* cut to 64 px wide and 64 high, and nothing white is in it"):
        make_canvas(picture(64, 200), lost, **MODEL, height=64, width=64)


@pytest.mark.parametrize("size", [{"height": 60, "width": 64}, {"height": 64, "width": 0}, {"height": -8, "width": 8}])
def test_sizes_that_the_model_does_not_draw_are_refused(size):
    words = f"height={size['height']} width={size['width']}: this model draws sizes divisible by 8"
    with pytest.raises(UserError, match=words):
        make_canvas(picture(), **MODEL, **size)


def test_one_size_that_the_model_does_not_draw_is_refused():
    with pytest.raises(UserError, match=r"^width=12: this model draws sizes divisible by 8"):
        make_canvas(picture(), **MODEL, height=None, width=12)


@pytest.mark.parametrize("shape", [(64, 257), (31, 64), (300, 600), (9, 30)])
def test_a_picture_far_from_the_model_s_size_is_refused_with_a_size_that_works(shape, tmp_path):
    path = tmp_path / "big.png"
    path.write_bytes(encoded(picture(*shape)))
    with pytest.raises(UserError, match=r"init_image=.*big.png: the picture is \d+ px wide .* trained at 64") as error:
        make_canvas(path, **FREE)
    height, width = (int(re.search(rf"{side}=(\d+)", str(error.value))[1]) for side in ("height", "width"))
    assert min(height, width) == 64 and height % 8 == width % 8 == 0
    assert height / width == pytest.approx(shape[0] / shape[1], rel=0.1)
    assert make_canvas(path, **MODEL, height=height, width=width).pixels.shape == (height, width, 3)


def test_a_picture_smaller_than_a_cell_is_refused():
    with pytest.raises(UserError, match=r"the model was trained at 64; .* height=64 width=128"):
        own_size((40, 80), 64, 64, "init_image", outpainting=False)


SIDE = st.integers(1, 5000)


@given(
    original=st.tuples(SIDE, SIDE),
    given_=st.integers(1, 100),
    factor=st.sampled_from([1, 4, 8, 64]),
    tall=st.booleans(),
)
def test_the_other_side_is_the_nearest_multiple(original, given_, factor, tall):
    given_ *= factor
    height, width = wanted_size(original, *((given_, None) if tall else (None, given_)), factor)
    ideal = given_ * (original[1] / original[0] if tall else original[0] / original[1])
    other = width if tall else height
    assert (height if tall else width) == given_
    assert other % factor == 0 and other >= factor
    assert abs(other - ideal) <= factor / 2 or (other == factor and ideal < factor)


@given(original=st.tuples(SIDE, SIDE), factor=st.sampled_from([1, 4, 8, 64]), cells=st.integers(1, 16))
def test_a_picture_s_own_size_is_cut_by_less_than_a_cell_or_refused(original, factor, cells):
    default_size = cells * factor
    try:
        height, width = own_size(original, factor, default_size, "init_image", outpainting=False)
    except UserError as error:
        assert max(original) > 4 * default_size or min(original) < default_size / 2 or min(original) < factor
        proposed = [int(value) for value in re.findall(r"(?:height|width)=(\d+)", str(error))]
        assert min(proposed) == default_size and all(value % factor == 0 for value in proposed)
        return
    assert height % factor == width % factor == 0 and min(height, width) > 0
    assert 0 <= original[0] - height < factor and 0 <= original[1] - width < factor
    assert own_size(original, factor, default_size, "init_image", outpainting=True) == original


# -------------------------------------------------------------------------------------------------------- outpainting


def test_outpaint_is_read():
    assert parse_outpaint("left:64,right:32") == {"left": 64, "top": 0, "right": 32, "bottom": 0}
    assert parse_outpaint(" top : 8 ,bottom:0") == {"left": 0, "top": 8, "right": 0, "bottom": 0}


@pytest.mark.parametrize(
    "text",
    [
        *("", "left", "left:", "left:-8", "left:8.5", "left:x", "north:8", "left=8", "left:8,left:8", "left:0"),
        *("left:8,", "left:8;right:8", "LEFT:8", "left:1e3", "left:1_0", "left:٣", "left:" + "9" * 5000, "64"),
    ],
)
def test_outpaint_that_is_not_understood_shows_the_right_form(text):
    with pytest.raises(UserError, match=r"outpaint=left:64,right:32; the sides are left, top, right, bottom"):
        parse_outpaint(text)


@given(st.text(alphabet="leftopbmrigh:,0123456789 -.", max_size=30))
def test_any_text_is_read_or_refused(text):
    try:
        found = parse_outpaint(text)
    except UserError:
        return
    assert list(found) == ["left", "top", "right", "bottom"]
    assert all(value >= 0 for value in found.values()) and any(found.values())
    assert parse_outpaint(",".join(f"{side}:{value}" for side, value in found.items())) == found


def test_outpainting_adds_white_and_repeats_the_edge():
    pixels = picture()
    canvas = make_canvas(pixels, **FREE, outpaint="left:8,bottom:16")
    assert canvas.pixels.shape == (80, 72, 3)
    assert np.array_equal(canvas.pixels[:64, 8:], pixels)
    assert (canvas.pixels[:64, :8] == pixels[:, :1]).all() and (canvas.pixels[64:, 8:] == pixels[-1:]).all()
    assert (canvas.pixels[64:, :8] == pixels[-1, 0]).all()
    assert (canvas.mask[:64, 8:] == 0).all()
    assert (canvas.mask[64:] == 1).all() and (canvas.mask[:, :8] == 1).all()


def test_outpainting_keeps_a_mask_and_takes_a_size():
    canvas = make_canvas(picture(128, 128), stripe(128, 128, 32, 64), **MODEL, height=64, width=64, outpaint="top:8")
    assert canvas.mask.shape == (72, 64)
    assert (canvas.mask[:8] == 1).all() and (canvas.mask[8:, 20:28] == 1).all() and (canvas.mask[8:, 40:] == 0).all()


def test_outpainting_leaves_a_picture_uncut_where_the_total_fits():
    pixels = picture(60, 75)
    canvas = make_canvas(pixels, **FREE, outpaint="right:5,top:3,bottom:1")
    assert canvas.pixels.shape == (64, 80, 3) and np.array_equal(canvas.pixels[3:63, :75], pixels)


def test_outpainting_to_a_size_that_does_not_fit_proposes_one_that_does():
    with pytest.raises(
        UserError, match=r"outpaint=left:3,right:4: the canvas would be 82 px wide and 61 high"
    ) as error:
        make_canvas(picture(61, 75), **FREE, outpaint="right:4,left:3")
    proposed = re.search(r"outpaint=(\S+) fits", str(error.value))[1]
    assert proposed == "left:3,right:10,bottom:3"
    assert make_canvas(picture(61, 75), **FREE, outpaint=proposed).pixels.shape == (64, 88, 3)


# ------------------------------------------------------------------------------------------------------------- mask


def brute_distance(region):
    places = np.argwhere(region)
    grid = np.stack(np.mgrid[: region.shape[0], : region.shape[1]], -1)
    return np.sqrt(((grid[:, :, None] - places) ** 2).sum(-1)).min(-1)


@settings(deadline=None)
@given(seed=st.integers(0, 999), limit=st.integers(1, 30), density=st.sampled_from([0.005, 0.05, 0.5]))
def test_distance_is_euclidean_up_to_its_limit(seed, limit, density):
    region = np.random.default_rng(seed).random((17, 23)) < density
    region[3, 5] = True
    found, expected = distance(region, limit), brute_distance(region)
    near = expected <= limit
    np.testing.assert_allclose(found[near], expected[near], rtol=1e-6)
    assert (found[~near] > limit).all()


def test_distance_to_nothing_is_infinite():
    assert np.isinf(distance(np.zeros((4, 4), bool), 100)).all()


@pytest.mark.parametrize("blur", [1, 2, 7, 16])
def test_blur_ramps_up_inside_the_white_and_nowhere_else(blur):
    sharp = make_canvas(picture(), stripe(), **FREE).mask
    soft = make_canvas(picture(), stripe(), **FREE, mask_blur=blur).mask
    assert soft.dtype == np.float32
    assert ((soft == 0) == (sharp == 0)).all()
    row = soft[30, 16:48]
    assert (np.diff(row[:16]) >= 0).all() and np.array_equal(row, row[::-1])
    assert row[0] == np.float32(0.5 / blur) and (row[blur : 32 - blur] == 1).all()
    assert (soft[0] == soft[30]).all()  # the edge of the picture is no edge of the mask


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999), blur=st.integers(0, 9))
def test_blur_keeps_black_and_never_adds(seed, blur):
    mask = np.random.default_rng(seed).choice([0, 0, 90, 255], (6, 6)).astype(np.uint8).repeat(6, 0).repeat(6, 1)
    mask[0, 0] = 255
    model = {"factor": 4, "default_size": 32, "height": None, "width": None}
    sharp, soft = (make_canvas(picture(36, 36), mask, **model, mask_blur=b).mask for b in (0, blur))
    assert ((soft == 0) == (sharp == 0)).all() and (soft <= sharp).all()
    deep = brute_distance(sharp == 0) > blur + 0.5 if (sharp == 0).any() else np.ones_like(sharp, bool)
    assert np.array_equal(soft[deep], sharp[deep])


def test_blur_without_black_changes_nothing():
    assert make_canvas(picture(), **FREE, mask_blur=9).mask is None
    assert (make_canvas(picture(), stripe(left=0, right=64), **FREE, mask_blur=9).mask == 1).all()
    with pytest.raises(UserError, match="mask_blur=-1"):
        make_canvas(picture(), **FREE, mask_blur=-1)


@settings(deadline=None, max_examples=40)
@given(
    sides=st.lists(st.sampled_from([0, 8, 24]), min_size=4, max_size=4).filter(any),
    blur=st.integers(1, 12),
    masked=st.booleans(),
)
def test_outpainting_draws_all_that_is_new_and_fades_into_the_picture(sides, blur, masked):
    outpaint = ",".join(
        f"{side}:{value}" for side, value in zip(("left", "top", "right", "bottom"), sides, strict=True)
    )
    left, top = sides[:2]
    mask = stripe(64, 64, 28, 36) if masked else None
    canvas = make_canvas(picture(), mask, **FREE, outpaint=outpaint, mask_blur=blur)
    new = np.ones(canvas.mask.shape, bool)
    new[top : top + 64, left : left + 64] = False
    assert (canvas.mask[new] == 1).all()
    if not masked:
        y, x = np.mgrid[:64, :64]
        away = [each for each, side in zip((x + 1, y + 1, 64 - x, 64 - y), sides, strict=True) if side]
        assert ((canvas.mask == 0)[~new] == (np.min(away, axis=0) > blur).flatten()).all()
        if left:
            ramp = canvas.mask[top + 32, left : left + blur]
            assert (np.diff(ramp) < 0).all() and ramp[-1] == np.float32(0.5 / blur)


def test_a_cell_is_repainted_as_much_as_its_most_repainted_pixel():
    mask = np.zeros((16, 24), np.float32)
    mask[3, 9], mask[8, 23], mask[15, 16] = 0.25, 0.5, 1
    found = latent_mask(mask, 8)
    assert found.dtype == torch.float32 and found.tolist() == [[[[0, 0.25, 0], [0, 0, 1]]]]
    assert torch.equal(latent_mask(mask, 1)[0, 0], torch.from_numpy(mask))


def test_the_masked_picture_is_zero_where_it_is_repainted():
    pixels, mask = picture(16, 16), np.arange(256, dtype=np.float32).reshape(16, 16) / 256
    found = masked_image(Canvas(pixels, mask))
    assert found.shape == (1, 3, 16, 16)
    kept = torch.from_numpy(mask < 0.5)
    assert torch.equal(found[0][:, kept], to_tensor(pixels)[:, kept]) and (found[0][:, ~kept] == 0).all()
    assert (masked_image(Canvas(pixels, None)) == 0).all()


# -------------------------------------------------------------------------------------------------------- composite


def every_value():
    """All 256 values in each of three columns of 256 rows."""
    return np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, 1).repeat(3, 2)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_is_kept_to_the_bit_and_what_is_drawn_too(dtype, scale):
    image = (torch.randn(3, 256, 3, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)
    mask = np.broadcast_to(np.array([0, 0.5, 1], np.float32), (256, 3)).copy()
    found = to_pixels(composite(Canvas(every_value(), mask), image))
    assert np.array_equal(found[:, 0], every_value()[:, 0])
    assert np.array_equal(found[:, 2], to_pixels(image)[:, 2])
    middle = (every_value()[:, 1].astype(int) + to_pixels(image)[:, 1]) / 2
    assert np.abs(found[:, 1] - middle).max() <= 1


@given(weight=st.floats(0, 1, width=32), old=st.integers(0, 255), new=st.floats(-1, 1, width=32))
def test_a_blend_lies_between_its_ends(weight, old, new):
    canvas = Canvas(np.full((1, 1, 3), old, np.uint8), np.full((1, 1), weight, np.float32))
    image = torch.full((3, 1, 1), new)
    found, end = int(to_pixels(composite(canvas, image))[0, 0, 0]), int(to_pixels(image)[0, 0, 0])
    assert min(old, end) <= found <= max(old, end)


def test_without_a_mask_everything_is_drawn():
    image = torch.linspace(-1.5, 1.5, 768).reshape(3, 16, 16)
    assert np.array_equal(to_pixels(composite(Canvas(picture(16, 16), None), image)), to_pixels(image))


def test_what_the_mask_keeps_of_a_file_is_the_file(tmp_path):
    """From file to file, with a soft edge: pixels under black are those of the input, all of them."""
    pixels = picture(70, 90)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(pixels))
    canvas = make_canvas(path, stripe(70, 90, 30, 60), **FREE, mask_blur=4)
    drawn = torch.rand(3, 64, 88, generator=torch.Generator().manual_seed(1)) * 2 - 1
    result = to_pixels(composite(canvas, drawn))
    kept = canvas.mask == 0
    assert kept.mean() > 0.5
    assert np.array_equal(result[kept], pixels[3:67, 1:89][kept])
    assert (result[canvas.mask == 1] != pixels[3:67, 1:89][canvas.mask == 1]).any()
