"""Whole pictures beside diffusers' pipeline, and what a picture may and may not depend on."""

import json
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

import tiny
from ldm import LatentDiffusionPipeline
from ldm.data.images import to_pixels
from ldm.diffusion.samplers import SAMPLERS
from ldm.errors import UserError
from ldm.gallery import read_settings
from ldm.pipeline import DTYPES, find_device
from ldm.weights.folder import load_json, save_network
from runs import run_script

PROMPT, OTHER = "a large red circle", "a small green star"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny.write_model_folder(tmp_path_factory.mktemp("pipeline") / "model")


@pytest.fixture(scope="module")
def pipeline(model_folder):
    return LatentDiffusionPipeline.from_pretrained(str(model_folder), device="cpu")


@pytest.fixture
def folder(tmp_path):
    """A model folder to spoil."""
    return tiny.write_model_folder(tmp_path / "model")


def edit_scheduler(folder, remove=(), **options) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    config = {name: value for name, value in {**load_json(path), **options}.items() if name not in remove}
    path.write_text(json.dumps(config))


def draw(pipeline, prompts=(PROMPT,), seeds=(3,), *args, **options) -> torch.Tensor:
    return torch.stack(list(pipeline.generate(list(prompts), list(seeds), *args, **options)))


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of images in [-1, 1], dB."""
    return float(10 * torch.log10(4 / (one - other).square().mean()))


# -------------------------------------------------------------------------------------------------- beside diffusers

# What Stable Diffusion 1.5 ships: timesteps from 1 up, and the last step goes to the first timestep's noise, not to 0.
SD15 = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
GRIDS = {"ours": {}, "sd15": SD15, "sd15 to zero": {**SD15, "set_alpha_to_one": True}}
OPTIONS = {
    "no guidance": {"guidance_scale": 1.0},
    "guidance 3": {"guidance_scale": 3.0},
    "guidance 7.5": {"guidance_scale": 7.5},
    "5 steps": {"steps": 5},
    "20 steps": {"steps": 20},
    "1 step": {"steps": 1},
    "negative prompt": {"negative_prompt": "blue, small"},
    "wide": {"height": 16, "width": 40},
    "tall": {"height": 32, "width": 24},
    "long prompt": {"prompt": "a red circle " * 12},
    "no prompt": {"prompt": ""},
    "any text": {"prompt": "ein großes Pokémon, 日本 🙂"},
    "greatest seed": {"seed": 2**64 - 1},
}


@pytest.fixture(scope="module", params=["epsilon", "v_prediction", "sample"])
def prediction_type(request):
    return request.param


@pytest.fixture(scope="module", params=GRIDS)
def both(request, prediction_type, tmp_path_factory):
    folder = tiny.write_model_folder(tmp_path_factory.mktemp("both") / "model", prediction_type)
    edit_scheduler(folder, **GRIDS[request.param])
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    assert isinstance(theirs.scheduler, DDIMScheduler)
    return LatentDiffusionPipeline.from_pretrained(str(folder), device="cpu"), theirs


@pytest.mark.parametrize("name", OPTIONS)
def test_the_same_picture_as_diffusers(both, name):
    ours, theirs = both
    options = {"steps": 10, "height": 16, "width": 16, "guidance_scale": 3.0, "seed": 3, "prompt": PROMPT}
    options |= {"negative_prompt": "", **OPTIONS[name]}
    prompt, seed, steps = options.pop("prompt"), options.pop("seed"), options.pop("steps")
    found = draw(ours, [prompt], [seed], sampler="ddim", steps=steps, **options)
    generator = torch.Generator().manual_seed(seed)
    theirs_np = theirs(prompt, num_inference_steps=steps, generator=generator, output_type="np", **options).images
    expected = torch.from_numpy(theirs_np).permute(0, 3, 1, 2) * 2 - 1
    assert found.shape == expected.shape == (1, 3, options["height"], options["width"])
    assert expected.std() > 0.2 and (expected.abs() == 1).float().mean() < 0.5  # something to be compared
    assert psnr(found, expected) > 90


def test_the_scheduler_file_of_stable_diffusion_1_5(folder):
    """The published file, word for word; it does not say how timesteps are spaced."""
    published = {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "num_train_timesteps": 1000,
        "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
        "clip_sample": False,
    }  # fmt: skip
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(published))
    index = load_json(folder / "model_index.json")
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    ours = LatentDiffusionPipeline.from_pretrained(str(folder), device="cpu")
    published = theirs.scheduler.config
    for sampler, scheduler in (
        ("ddim", DDIMScheduler), ("euler", EulerDiscreteScheduler), ("dpmpp_2m", DPMSolverMultistepScheduler),
        ("unipc", UniPCMultistepScheduler),
    ):  # fmt: skip
        theirs.scheduler = scheduler.from_config(published)  # takes over what the file says, and its own defaults
        generator = torch.Generator().manual_seed(3)
        expected = theirs(PROMPT, num_inference_steps=20, guidance_scale=3.0, generator=generator, output_type="np")
        found = draw(ours, steps=20, sampler=sampler)
        assert psnr(found, torch.from_numpy(expected.images).permute(0, 3, 1, 2) * 2 - 1) > 70


def test_a_batch_is_that_of_diffusers_with_a_generator_for_each_picture(model_folder, pipeline):
    theirs = StableDiffusionPipeline.from_pretrained(model_folder)
    theirs.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]
    prompts = [PROMPT, OTHER, ""]
    expected = theirs(prompts, num_inference_steps=5, guidance_scale=3.0, generator=generators).images
    for ours, other in zip(pipeline(prompts, seed=5), expected, strict=True):
        assert ours.size == other.size == (16, 16)
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(other)).max() <= 1


def test_diffusers_pipeline_says_nothing_of_our_folder(model_folder, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = StableDiffusionPipeline.from_pretrained(model_folder)
    assert theirs.safety_checker is None and not caplog.records
    assert (theirs.unet.config.sample_size, theirs.vae_scale_factor) == (8, 2)


# ----------------------------------------------------------------------------------- what a picture is a function of


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_picture_is_the_same_in_every_batch(pipeline, sampler, guidance_scale):
    options = {"sampler": sampler, "guidance_scale": guidance_scale, "steps": 5}
    prompts, seeds = [PROMPT, OTHER, PROMPT, "", OTHER], [0, 1, 2, 0, 0]
    whole = draw(pipeline, prompts, seeds, **options)
    for batch_size in (1, 2, 3):
        assert psnr(draw(pipeline, prompts, seeds, batch_size=batch_size, **options), whole) > 90
    alone = draw(pipeline, [OTHER], [1], **options)
    assert psnr(alone, whole[1:2]) > 90
    backwards = draw(pipeline, prompts[::-1], seeds[::-1], **options).flip(0)
    assert psnr(backwards, whole) > 90


def test_every_argument_changes_the_picture(pipeline):
    options = {"steps": 5, "guidance_scale": 3.0, "sampler": "ddim"}
    base = draw(pipeline, **options)
    assert torch.equal(draw(pipeline, **options), base)
    others = {
        "prompt": draw(pipeline, [OTHER], **options),
        "seed": draw(pipeline, seeds=[4], **options),
        "negative prompt": draw(pipeline, [PROMPT], [3], OTHER, **options),
        "steps": draw(pipeline, **{**options, "steps": 6}),
        "guidance": draw(pipeline, **{**options, "guidance_scale": 7.5}),
        "no guidance": draw(pipeline, **{**options, "guidance_scale": 1.0}),
        "sampler": draw(pipeline, **{**options, "sampler": "ddpm"}),
    }
    alike = {what: psnr(picture, base) for what, picture in others.items() if psnr(picture, base) > 60}
    assert not alike


def test_the_negative_prompt_does_nothing_without_guidance(pipeline):
    one, other = (draw(pipeline, [PROMPT], [3], negative, guidance_scale=1.0) for negative in ("", OTHER))
    assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [0, 0.5])
def test_guidance_below_one_is_none(pipeline, scale):
    """As in diffusers; models that are distilled for no guidance are asked so."""
    assert torch.equal(draw(pipeline, guidance_scale=scale), draw(pipeline, guidance_scale=1.0))


def test_sampling_leaves_the_global_random_state_alone(pipeline):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = draw(pipeline, sampler="ddpm")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(draw(pipeline, sampler="ddpm"), one)


def test_ddpm_draws_noise_anew_at_each_step_of_each_picture(pipeline):
    """With one seed twice in a batch the two are the same picture; with two seeds they are not."""
    same = draw(pipeline, [PROMPT] * 2, [5, 5], sampler="ddpm")
    other = draw(pipeline, [PROMPT] * 2, [5, 6], sampler="ddpm")
    assert psnr(same[0], same[1]) > 90 and psnr(other[0], other[1]) < 40
    assert psnr(other[0], same[0]) > 90


def test_defaults_are_those_of_the_model_folder(pipeline):
    assert pipeline.settings == {"sampler": "ddim", "steps": 5, "guidance_scale": 3.0}
    assert pipeline.default_size == 16
    explicit = draw(pipeline, sampler="ddim", steps=5, guidance_scale=3.0, height=16, width=16)
    assert torch.equal(draw(pipeline), explicit)


def test_a_folder_of_another_tool_has_defaults_too(folder):
    (folder / "ldm.json").unlink()
    pipeline = LatentDiffusionPipeline.from_pretrained(str(folder), device="cpu")
    assert pipeline.settings == {"sampler": "ddim", "steps": 50, "guidance_scale": 7.5}


@pytest.mark.parametrize(("sample_size", "side"), [(8, 16), ([8, 8], 16), ([8, 12], 24), (None, 128)])
def test_the_size_of_training_is_the_default(tmp_path, sample_size, side):
    folder = tiny.write_model_folder(tmp_path, sample_size=sample_size)
    assert LatentDiffusionPipeline.from_pretrained(str(folder), device="cpu").default_size == side


# --------------------------------------------------------------------------------------------------------- handing out


def test_pictures_come_in_order_as_soon_as_their_batch_is_done(pipeline, monkeypatch):
    decoded = []
    decode = pipeline.vae.decode
    monkeypatch.setattr(pipeline.vae, "decode", lambda z: (decoded.append(len(z)), decode(z))[1])
    pictures = pipeline.generate([PROMPT] * 5, range(5), batch_size=2)
    assert decoded == []
    first = next(pictures)
    assert decoded == [2]
    next(pictures), next(pictures)
    assert decoded == [2, 2]
    assert len(list(pictures)) == 2 and decoded == [2, 2, 1]
    assert psnr(first, draw(pipeline, [PROMPT], [0])[0]) > 90


def test_inference_mode_does_not_leak_to_who_takes_the_pictures(pipeline):
    pictures = pipeline.generate([PROMPT] * 3, range(3), batch_size=2)
    for _ in range(3):
        next(pictures)
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        weight = torch.ones(2, requires_grad=True)
        (weight * 2).sum().backward()
    assert weight.grad is not None


def test_pictures_are_in_range_and_on_the_cpu_in_float32(pipeline):
    pictures = draw(pipeline, [PROMPT] * 2, [0, 1])
    assert pictures.dtype == torch.float32 and pictures.device.type == "cpu"
    assert pictures.min() >= -1 and pictures.max() <= 1 and pictures.isfinite().all()


def test_calling_gives_pillow_pictures_with_seeds_counted_up(pipeline):
    one, two = pipeline([PROMPT, OTHER], seed=7, steps=2)
    assert isinstance(one, Image.Image) and one.size == (16, 16)
    (alone,) = pipeline(OTHER, seed=8, steps=2)
    assert np.abs(np.asarray(alone).astype(int) - np.asarray(two)).max() <= 1


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_draws_about_the_same(model_folder, pipeline, dtype):
    half = LatentDiffusionPipeline.from_pretrained(str(model_folder), dtype, "cpu")
    found = draw(half, [PROMPT, OTHER], [3, 4])
    for network in (half.unet, half.vae, half.conditioner):
        assert {p.dtype for p in network.parameters()} == {DTYPES[dtype]}
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert psnr(found, draw(pipeline, [PROMPT, OTHER], [3, 4])) > 25


def test_weights_stored_in_half_precision_still_draw(folder, pipeline):
    save_network(tiny.vae().half(), folder / "vae")
    save_network(tiny.unet().half(), folder / "unet")
    found = draw(LatentDiffusionPipeline.from_pretrained(str(folder), device="cpu"))
    assert psnr(found, draw(pipeline)) > 35


def test_nothing_is_left_to_be_trained(pipeline):
    for module in (pipeline.unet, pipeline.vae, pipeline.conditioner):
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_a_run_directory_is_opened_as_well(tmp_path, pipeline):
    tiny.write_model_folder(tmp_path / "model")
    assert torch.equal(draw(LatentDiffusionPipeline.from_pretrained(str(tmp_path), device="cpu")), draw(pipeline))


# ----------------------------------------------------------------------------------------------------------- channels


@pytest.fixture(scope="module", params=[(1, "L"), (4, "RGBA")], ids=["grey", "RGBA"])
def coloured(request, tmp_path_factory):
    """A model whose VAE has another number of channels, that number, and the mode of its pictures."""
    channels, mode = request.param
    folder = tiny.write_model_folder(tmp_path_factory.mktemp("channels") / "model")
    save_network(tiny.vae(in_channels=channels, out_channels=channels), folder / "vae")
    return folder, channels, mode


def picture(mode, side=16):
    pixels = np.random.default_rng(1).integers(0, 256, (side, side, 4), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def test_pictures_have_the_channels_of_the_vae(coloured):
    folder, channels, mode = coloured
    pipeline = LatentDiffusionPipeline.from_pretrained(str(folder), device="cpu")
    found = draw(pipeline)
    assert found.shape == (1, channels, 16, 16)
    assert psnr(draw(pipeline, vae_tile=512), found) > 60
    (image,) = pipeline(PROMPT, seed=3)
    assert image.mode == mode and image.size == (16, 16)
    theirs = StableDiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    expected = theirs(PROMPT, num_inference_steps=5, guidance_scale=3.0, generator=generator, output_type="np").images
    assert psnr(found, torch.from_numpy(expected).permute(0, 3, 1, 2) * 2 - 1) > 80


@pytest.mark.parametrize("given_mode", ["L", "RGB", "RGBA"])
def test_a_picture_to_draw_upon_comes_in_the_channels_of_the_vae(coloured, given_mode):
    folder, _, mode = coloured
    pipeline = LatentDiffusionPipeline.from_pretrained(str(folder), device="cpu")
    given_picture = picture(given_mode)
    base = Image.new("RGBA", (16, 16), "white")
    seen = (
        given_picture.convert("RGBA") if mode == "RGBA" else Image.alpha_composite(base, given_picture.convert("RGBA"))
    )
    one, other = (draw(pipeline, init_image=image, strength=0.2) for image in (given_picture, seen.convert(mode)))
    assert psnr(one, other) > 50 and psnr(one, draw(pipeline, init_image=picture(mode).rotate(90), strength=0.2)) < 40


def test_what_a_mask_keeps_is_kept_in_all_channels(coloured):
    folder, channels, mode = coloured
    pipeline = LatentDiffusionPipeline.from_pretrained(str(folder), device="cpu")
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    (found,) = draw(pipeline, init_image=picture(mode), mask=mask)
    pixels = np.asarray(picture(mode)).reshape(16, 16, channels)
    assert np.array_equal(to_pixels(found)[:, :8], pixels[:, :8])
    assert (to_pixels(found)[:, 8:] != pixels[:, 8:]).any(axis=(0, 1)).all()
    grown = draw(pipeline, init_image=picture(mode), outpaint="left:4")
    assert np.array_equal(to_pixels(grown[0])[:, 4:], pixels)


def test_an_inpainting_unet_over_other_channels(coloured, tmp_path):
    _, channels, mode = coloured
    model = tiny.write_model_folder(tmp_path / "model", in_channels=9, out_channels=4)
    save_network(tiny.vae(in_channels=channels, out_channels=channels), model / "vae")
    pipeline = LatentDiffusionPipeline.from_pretrained(str(model), device="cpu")
    mask = np.full((16, 16), 255, np.uint8)
    assert draw(pipeline, init_image=picture(mode), mask=mask).shape == (1, channels, 16, 16)


def test_a_vae_that_gives_alpha_to_what_had_none(folder):
    save_network(tiny.vae(in_channels=3, out_channels=4), folder / "vae")
    pipeline = LatentDiffusionPipeline.from_pretrained(str(folder), device="cpu")
    mask = np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    (found,) = draw(pipeline, init_image=picture("RGB"), mask=mask)
    assert np.array_equal(to_pixels(found)[:, :8], np.asarray(picture("RGB").convert("RGBA"))[:, :8])


def test_files_of_sample_have_the_channels_of_the_vae(coloured, tmp_path):
    folder, _, mode = coloured
    picture(mode).save(tmp_path / "a.png")
    arguments = [f"ckpt={folder}", f"prompt={PROMPT}", "num_images=2", "steps=2", "device=cpu", f"out={tmp_path}/out"]
    assert run_script("sample", *arguments, f"init_image={tmp_path}/a.png") == 0
    *files, sheet = sorted((tmp_path / "out").glob("*.png"))
    assert [Image.open(file).mode for file in files] == [mode] * 2 and Image.open(sheet).mode == "RGB"
    assert [read_settings(file)["seed"] for file in files] == [0, 1]


@pytest.mark.parametrize("option", ["in_channels", "out_channels"])
def test_a_vae_of_channels_that_no_picture_has(folder, option):
    save_network(tiny.vae(**{option: 2}), folder / "vae")
    assert f"the VAE has {option}=2; pictures have 1 (grey), 3 (RGB) or 4 (RGBA)" in refusal(folder)


# ----------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "dimm"}, "sampler=dimm is unknown; there are: ddim, ddpm"),
        ({"height": 18}, "height=18 width=16: this model draws sizes divisible by 4"),
        ({"width": 30}, "height=16 width=30: this model draws sizes divisible by 4"),
        ({"height": -4}, "sizes divisible by 4"),
        ({"steps": 1001}, "steps=1001: this model takes 1 to 1000 steps"),
        ({"steps": 0}, "steps=0: this model takes 1 to 1000 steps"),
        ({"steps": -3}, "steps=-3"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"guidance_scale": -1}, "guidance_scale=-1"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"negative_prompt": ["a", "b"]}, "1 prompts, 1 seeds, 2 negative prompts"),
        ({"strength": 0.5}, "strength= belongs to init_image="),
    ],
)
def test_bad_settings_are_refused_before_anything_is_drawn(pipeline, options, message):
    with pytest.raises(UserError, match=message):
        pipeline.generate([PROMPT], [0], **options)


def test_seeds_and_numbers_of_pictures(pipeline):
    assert len(pipeline([PROMPT, OTHER], num_images=2, steps=1)) == 4
    assert len(pipeline([PROMPT, OTHER], seed=[3, 4, 5], steps=1)) == 6
    with pytest.raises(UserError, match="leave num_images out"):
        pipeline(PROMPT, seed=[3, 4], num_images=2)
    with pytest.raises(UserError, match="2 prompts, 1 seeds"):
        pipeline.generate([PROMPT, OTHER], [0])


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(pipeline, seed):
    with pytest.raises(UserError, match=f"seed={seed}: seeds are whole numbers from 0"):
        next(pipeline.generate([PROMPT, PROMPT], [0, seed]))


def test_as_many_steps_as_training_has(pipeline):
    assert draw(pipeline, steps=1000, guidance_scale=1.0, height=4, width=4).isfinite().all()


@pytest.mark.parametrize("device", ["cuda:99", "banana", "", "mps:7", "xla", "hpu", "vulkan"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(UserError, match=rf"device={device} is not available: "):
        find_device(device)


def test_devices_that_are_there():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type in ("cpu", "cuda", "mps")


def refusal(folder) -> str:
    with pytest.raises(UserError) as caught:
        LatentDiffusionPipeline.from_pretrained(str(folder), device="cpu")
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction_type": "flow"}, "flow"),
        ({"timestep_spacing": "karras"}, "timestep_spacing='karras' is not supported"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"beta_start": "low"}, "not supported between"),
        ({"num_train_timesteps": None}, "NoneType"),
        ({"steps_offset": -1}, "steps_offset=-1"),
        ({"solver_order": 3}, "solver_order=3 is not supported"),
        ({"final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
        ({"_class_name": "LCMScheduler"}, "distilled"),
        ({"steps_offset": None}, "steps_offset=None"),
        ({"remove": ["beta_start"]}, "lacks beta_start"),
    ],
)
def test_schedulers_of_another_kind(folder, options, message):
    edit_scheduler(folder, **options)
    told = refusal(folder)
    assert "scheduler/scheduler_config.json" in told and message in told


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_a_missing_part_is_named(folder, part):
    (folder / part).rename(folder / "elsewhere")
    assert f"/{part}" in refusal(folder)


def test_parts_that_do_not_fit_each_other(folder):
    save_network(tiny.unet(cross_attention_dim=24), folder / "unet")
    assert "the U-Net listens to context of width 24, the text encoder gives 16" in refusal(folder)
    save_network(tiny.unet(in_channels=8), folder / "unet")
    assert "the U-Net has in_channels=8, the VAE 4 latent channels" in refusal(folder)
    save_network(tiny.unet(out_channels=8), folder / "unet")
    assert "the U-Net predicts 8 channels, the VAE has 4 latent channels" in refusal(folder)
    save_network(tiny.unet(), folder / "unet")
    save_network(tiny.text_tower(vocab_size=100, eos_token_id=99), folder / "text_encoder")
    assert "tokens, the text encoder embeds 100" in refusal(folder)


def test_ckpt_of_another_kind(folder):
    assert "is a single network, not a whole model" in refusal(folder / "unet")
    assert "there is no such folder" in refusal(folder / "nothing")


@pytest.mark.parametrize(
    "settings", [{"sampler": {"a": 1}}, {"sampler": [1]}, {"steps": "9"}, {"guidance_scale": None}]
)
def test_a_model_s_settings_may_be_anything(folder, settings):
    (folder / "ldm.json").write_text(json.dumps(settings))
    if settings == {"guidance_scale": None}:
        settings = {"guidance_scale": 7.5}
    with pytest.raises(UserError, match=f"{next(iter(settings))}="):
        draw(LatentDiffusionPipeline.from_pretrained(folder, device="cpu"))
