"""The command line beside diffusers' pipelines: foreign weights, every mode, one picture for one seed."""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import peers
from runs import run_script

SIZE = 32
PROMPT, NEGATIVE, SEED = "a large red circle", "blue, small", 7
SAMPLERS = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
}
MODES = {
    "text2img": (diffusers.StableDiffusionPipeline, (), {}),
    "img2img": (diffusers.StableDiffusionImg2ImgPipeline, ("init_image",), {"strength": 0.6}),
    "inpainting": (diffusers.StableDiffusionInpaintPipeline, ("init_image", "mask"), {}),
    "inpainting at 0.7": (diffusers.StableDiffusionInpaintPipeline, ("init_image", "mask"), {"strength": 0.7}),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A picture and a mask on disk."""
    folder = tmp_path_factory.mktemp("inputs")
    low = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(low).resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / "init_image.png")
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[8:24, 12:28] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def model(request, tmp_path_factory):
    """A model folder as diffusers writes it, and the same weights in a single file."""
    folder = peers.write_folder(tmp_path_factory.mktemp(request.param) / "folder", request.param)
    single = folder.with_name("single.safetensors")
    assert run_script("convert", f"src={folder}", f"dst={single}") == 0
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    return {"folder": folder, "single": single, "pipeline": pipeline, "expected": {}}


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.square(one.astype(float) - other).mean()
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def theirs(pipeline, mode, sampler, inputs, **more_options):
    _, files, options = MODES[mode]
    options = {**options, **more_options}
    scheduler, more = SAMPLERS[sampler]
    pipeline = MODES[mode][0](**{k: v for k, v in pipeline.components.items()}, requires_safety_checker=False)
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, **more)
    pipeline.set_progress_bar_config(disable=True)
    size = {} if mode == "img2img" else {"height": SIZE, "width": SIZE}
    pictures = {{"init_image": "image", "mask": "mask_image"}[k]: Image.open(inputs / f"{k}.png") for k in files}
    drawn = pipeline(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=10, guidance_scale=4.0,
        generator=torch.Generator().manual_seed(SEED), **pictures, **size, **options,
    ).images[0]  # fmt: skip
    drawn = np.asarray(drawn)
    if "mask" in files:  # they leave what is kept to the decoder; we put back the picture's own pixels
        kept = np.asarray(Image.open(inputs / "mask.png"))[..., None] == 0
        drawn = np.where(kept, np.asarray(Image.open(inputs / "init_image.png")), drawn)
    return drawn


def ours(out, ckpt, mode, sampler, inputs, *more):
    _, files, options = MODES[mode]
    size = [] if files else [f"height={SIZE}", f"width={SIZE}"]
    assert run_script(
        "sample", f"ckpt={ckpt}", f"prompt={PROMPT}", f"negative_prompt={NEGATIVE}", f"seed={SEED}", "steps=10",
        "guidance_scale=4", f"sampler={sampler}", f"out={out}", "device=cpu", *size, *more,
        *(f"{name}={inputs / name}.png" for name in files), *(f"{k}={v}" for k, v in options.items()),
    ) == 0  # fmt: skip
    [path] = out.glob("*.png")
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("form", ["folder", "single"])
def test_the_same_picture(model, form, sampler, mode, inputs, tmp_path):
    if (sampler, mode) not in model["expected"]:  # both forms are compared with one picture
        model["expected"][sampler, mode] = theirs(model["pipeline"], mode, sampler, inputs)
    expected = model["expected"][sampler, mode]
    found = ours(tmp_path, model[form], mode, sampler, inputs)
    assert expected.std() > 20  # something to be compared
    assert psnr(found, expected) >= 45


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting_models_with_nine_channels(strength, sampler, inputs, tmp_path):
    folder = peers.write_folder(tmp_path / "nine", "sd15", in_channels=9)
    single = tmp_path / "nine.safetensors"
    assert run_script("convert", f"src={folder}", f"dst={single}") == 0
    pipeline = diffusers.StableDiffusionInpaintPipeline.from_pretrained(folder)
    expected = theirs(pipeline, "inpainting", sampler, inputs, strength=strength)
    for form in (folder, single):
        found = ours(tmp_path / form.suffix / "out", form, "inpainting", sampler, inputs, f"strength={strength}")
        assert psnr(found, expected) >= 45


def test_a_vae_alone_in_either_form(model, inputs, tmp_path):
    folder, single = peers.write_vae(tmp_path / "vae", seed=5), tmp_path / "vae.safetensors"
    assert run_script("convert", f"src={folder}", f"dst={single}") == 0
    expected = []
    for vae in (
        diffusers.AutoencoderKL.from_pretrained(folder),
        diffusers.AutoencoderKL.from_single_file(str(single), config=str(folder)),
    ):
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(model["folder"], vae=vae)
        expected.append(theirs(pipeline, "img2img", "ddim", inputs))
    assert np.array_equal(*expected)
    plain = ours(tmp_path / "plain", model["folder"], "img2img", "ddim", inputs)
    for i, vae in enumerate((folder, single)):
        found = ours(tmp_path / f"out{i}", model["folder"], "img2img", "ddim", inputs, f"vae={vae}")
        assert psnr(found, expected[0]) >= 45 > psnr(plain, expected[0])


def test_diffusers_opens_the_single_file(model, inputs):
    single = diffusers.StableDiffusionPipeline.from_single_file(str(model["single"]), config=str(model["folder"]))
    folder = model["pipeline"]
    assert single.unet.config.attention_head_dim == folder.unet.config.attention_head_dim
    drawn = [theirs(pipeline, "text2img", "ddim", inputs) for pipeline in (single, folder)]
    assert np.array_equal(*drawn)
