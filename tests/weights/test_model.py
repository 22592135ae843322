"""Whole models: from every form into every other, mixed, fitting, and as diffusers sees them."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
from ldm import __version__
from ldm.diffusion.schedule import NoiseSchedule
from ldm.errors import UserError
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.clip import CLIP, TextTower
from ldm.nn.unet import UNet
from ldm.weights.folder import load_network, save_network, save_pipeline_index
from ldm.weights.model import Model, load_model, load_part, save_model, save_single_file
from ldm.weights.single_file import Network, join
from ldm.weights.tensors import read_metadata, write_weights
from ldm.weights.tokenizer import load_text_tokenizer

PARTS = {"unet": "unet", "vae": "vae", "text_encoder": "text_tower"}
PROMPTS = ["a large red circle", "", "a star!"]


def assert_same_network(found, expected) -> None:
    assert found.config == expected.config
    theirs = expected.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name
    assert not found.training


def assert_same(found: Model, expected: Model) -> None:
    """Bit for bit, word for word."""
    for name in PARTS.values():
        assert_same_network(getattr(found, name), getattr(expected, name))
    assert (found.scheduler, found.settings) == (expected.scheduler, expected.settings)
    tokens = [m.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=12) for m in (found, expected)]
    assert tokens[0]["input_ids"] == tokens[1]["input_ids"]


def refusal(load, *arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments, **options)
    return str(caught.value)


# Networks whose heads and groups are those that other tools' files stand for.
def sd_unet(is_v2: bool = False, **options: Any) -> UNet:
    widths = [64, 128] if is_v2 else [32, 64]
    options = {"attention_head_dim": [1, 2] if is_v2 else 8, "use_linear_projection": is_v2, **options}
    return tiny.unet(block_out_channels=widths, norm_num_groups=32, cross_attention_dim=64, sample_size=64, **options)


def sd_vae(**options: Any) -> AutoencoderKL:
    return tiny.vae(block_out_channels=[32, 64], norm_num_groups=32, sample_size=128, scaling_factor=0.18215, **options)


def sd_text(is_v2: bool = False) -> TextTower:
    return tiny.text_tower(hidden_size=64, num_attention_heads=1, hidden_act="gelu" if is_v2 else "quick_gelu")


def write_folder(folder: Path, unet: UNet, vae: AutoencoderKL, text_tower: TextTower, **settings: Any) -> Path:
    save_network(unet, folder / "unet")
    save_network(vae, folder / "vae")
    save_network(text_tower, folder / "text_encoder")
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    save_pipeline_index(folder, NoiseSchedule(), "v_prediction", settings)
    return folder


def original(*networks, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return networks under the names of a file of another tool."""
    names = {UNet: "unet", AutoencoderKL: "vae", TextTower: "text_encoder"}
    return {
        prefix + name: tensor.clone()
        for name, tensor in join({names[type(n)]: Network(n.config, n.state_dict()) for n in networks}).items()
    }


MODELS = {
    "ours": lambda: (tiny.unet(), tiny.vae(), tiny.text_tower()),
    "sd1": lambda: (sd_unet(), sd_vae(), sd_text()),
    "sd2": lambda: (sd_unet(True), sd_vae(), sd_text(True)),
    "inpainting": lambda: (tiny.unet(in_channels=9), tiny.vae(), tiny.text_tower()),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory) -> Path:
    """A model folder. Read it, do not write into it."""
    place = tmp_path_factory.mktemp("folder") / "model"
    return write_folder(place, *MODELS[request.param](), sampler="ddim", steps=3, guidance_scale=2.0)


@pytest.fixture
def model_folder(tmp_path) -> Path:
    """A model folder to spoil."""
    return tiny.write_model_folder(tmp_path / "model")


@pytest.fixture
def clip_on_the_hub(tmp_path, monkeypatch) -> Path:
    """CLIP's published tokenizer, which in truth knows more words."""
    tiny.tokenizer().save_pretrained(tmp_path / "clip")

    def snapshot_download(repo_id: str, **_: Any) -> str:
        assert repo_id == "openai/clip-vit-large-patch14"
        return str(tmp_path / "clip")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return tmp_path / "clip"


# ----------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_from_form_to_form_and_back_is_bit_equal(folder, tmp_path, dtype):
    first = load_model(str(folder), dtype)
    save_single_file(first, tmp_path / "one.safetensors")
    assert_same(load_model(str(tmp_path / "one.safetensors"), None), first)
    save_model(load_model(str(tmp_path / "one.safetensors"), None), tmp_path / "again")
    assert_same(load_model(str(tmp_path / "again"), None), first)


def test_the_same_model_makes_the_same_bytes(folder, tmp_path):
    for name in ("a", "b"):
        save_single_file(load_model(str(folder)), tmp_path / name / "one.safetensors")
        save_model(load_model(str(tmp_path / name / "one.safetensors")), tmp_path / name / "model")
    assert (tmp_path / "a" / "one.safetensors").read_bytes() == (tmp_path / "b" / "one.safetensors").read_bytes()
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a" / "model").rglob("*") if path.is_file())
    assert len(files) > 8
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        if name.parts[1] not in ("tokenizer", "model_index.json"):  # used before it was saved; its pipeline's class
            assert (tmp_path / "a" / name).read_bytes() == (folder / name.relative_to("model")).read_bytes()


def test_a_file_is_converted_as_it_is_written(folder, tmp_path):
    model = load_model(str(folder))
    save_single_file(model, tmp_path / "half.safetensors", torch.float16)
    save_model(model, tmp_path / "half", torch.float16)
    for source in ("half.safetensors", "half"):
        assert_same(load_model(str(tmp_path / source), None), load_model(str(folder), torch.float16))
    assert model.unet.conv_in.weight.dtype == torch.float32


def test_a_part_may_be_of_another_dtype(folder, tmp_path):
    model = load_model(str(folder), torch.float16)
    model.vae.float()
    dtypes = [{p.dtype for p in getattr(model, name).parameters()} for name in PARTS.values()]
    assert dtypes == [{torch.float16}, {torch.float32}, {torch.float16}]
    save_single_file(model, tmp_path / "mixed.safetensors")
    assert_same(load_model(str(tmp_path / "mixed.safetensors"), None), model)


def test_a_run_directory_is_its_model(tmp_path):
    tiny.write_model_folder(tmp_path / "run" / "model")
    model = load_model(str(tmp_path / "run"))
    assert_same(model, load_model(str(tmp_path / "run" / "model")))
    assert model.unet_file == tmp_path / "run" / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    assert model.settings == {"sampler": "ddim", "steps": 5, "guidance_scale": 3.0}


def test_a_models_own_scheduler_is_kept_word_for_word(model_folder, tmp_path):
    scheduler = {
        "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", "beta_end": 0.012, "beta_start": 0.00085,
        "beta_schedule": "scaled_linear", "num_train_timesteps": 1000, "set_alpha_to_one": False,
        "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
    }  # fmt: skip
    (model_folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (model_folder / "ldm.json").unlink()
    save_model(load_model(str(model_folder)), tmp_path / "out")
    save_single_file(load_model(str(tmp_path / "out")), tmp_path / "out.safetensors")
    assert json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text()) == scheduler
    assert load_model(str(tmp_path / "out.safetensors")).scheduler == scheduler
    assert not (tmp_path / "out" / "ldm.json").exists()
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(theirs.scheduler).__name__ == "PNDMScheduler"


# -------------------------------------------------------------------------------------------------- beside diffusers


def pictures(pipeline, **options: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    options = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 3.0, **options}
    images = pipeline(PROMPTS[:1] * 2, generator=generators, output_type="np", **options).images
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


def our_pictures(source: Path) -> torch.Tensor:
    from ldm.pipeline import LatentDiffusionPipeline

    pipeline = LatentDiffusionPipeline.from_pretrained(str(source), device="cpu")
    images = pipeline.generate(
        PROMPTS[:1] * 2, [3, 4], height=16, width=16, steps=4, guidance_scale=3.0, sampler="ddim"
    )
    return torch.stack(list(images))


@pytest.mark.parametrize("name", ["ours", "sd1", "sd2"])
def test_diffusers_draws_the_same_from_what_we_export(name, tmp_path):
    source = write_folder(tmp_path / "source", *MODELS[name]())
    model = load_model(str(source))
    save_model(model, tmp_path / "folder")
    save_single_file(model, tmp_path / "file.safetensors")
    expected = pictures(diffusers.StableDiffusionPipeline.from_pretrained(source))
    assert expected.std() > 0.1
    assert torch.equal(pictures(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder")), expected)
    opened = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "file.safetensors"), config=str(source), local_files_only=True
    )
    opened.scheduler = diffusers.DDIMScheduler.from_pretrained(source, subfolder="scheduler")
    assert torch.equal(pictures(opened), expected)
    for place in ("source", "folder", "file.safetensors"):
        torch.testing.assert_close(our_pictures(tmp_path / place), expected, rtol=0, atol=1e-4)


def test_an_inpainting_model_is_one_for_diffusers(tmp_path):
    source = write_folder(tmp_path / "source", *MODELS["inpainting"]())
    save_model(load_model(str(source)), tmp_path / "out")
    theirs = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert isinstance(theirs, diffusers.StableDiffusionInpaintPipeline)
    assert theirs.unet.config.in_channels == 9


def test_a_folder_that_diffusers_wrote(tmp_path):
    ours = tiny.write_model_folder(tmp_path / "ours")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(ours)
    expected = load_model(str(ours))
    for name, options in {"plain": {}, "fp16": {"variant": "fp16"}, "shards": {"max_shard_size": "40KB"},
                          "bin": {"safe_serialization": False}}.items():  # fmt: skip
        theirs.save_pretrained(tmp_path / name, **options)
        model = load_model(str(tmp_path / name), variant=options.get("variant"))
        for part in PARTS.values():
            assert_same_network(getattr(model, part), getattr(expected, part))
        assert model.scheduler["_class_name"] == "DDIMScheduler" and model.settings == {}
    assert model.unet_file.name == "diffusion_pytorch_model.bin"
    assert load_model(str(tmp_path / "shards")).unet_file.name.startswith("diffusion_pytorch_model-00001-of-")


def test_a_folder_with_a_safety_checker(model_folder):
    index = json.loads((model_folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (model_folder / "model_index.json").write_text(json.dumps(index))
    load_model(str(model_folder))


# ------------------------------------------------------------------------------------------- files of other tools


@pytest.mark.parametrize("is_v2", [False, True], ids=["sd1", "sd2"])
@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "pt"])
def test_a_file_of_another_tool(tmp_path, clip_on_the_hub, is_v2, ending, capsys):
    unet, vae, text = sd_unet(is_v2), sd_vae(), sd_text(is_v2)
    state, path = original(unet, vae, text), tmp_path / f"model.{ending}"
    if ending == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "global_step": 470000}, path)
    model = load_model(str(path))
    if is_v2:
        unet.config["sample_size"] = 96
    for found, expected in ((model.unet, unet), (model.vae, vae), (model.text_tower, text)):
        assert_same_network(found, expected)
    assert model.scheduler == {
        "_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
        "num_train_timesteps": 1000, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False,
        "timestep_spacing": "leading", "prediction_type": "v_prediction" if is_v2 else "epsilon",
    }  # fmt: skip
    assert model.settings == {} and model.unet_file == path
    assert model.tokenizer.pad_token_id == (0 if is_v2 else model.tokenizer.eos_token_id)
    assert ("need prediction_type=epsilon" in capsys.readouterr().out) == is_v2
    save_model(model, tmp_path / "folder")
    save_single_file(model, tmp_path / "file.safetensors")
    for source in ("folder", "file.safetensors"):
        assert_same(load_model(str(tmp_path / source)), model)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert theirs.tokenizer.pad_token_id == model.tokenizer.pad_token_id


@pytest.mark.parametrize("told", ["argument", "modelspec"])
def test_what_a_file_predicts_may_be_said(tmp_path, clip_on_the_hub, told, capsys):
    v2, v1 = original(sd_unet(True), sd_vae(), sd_text(True)), original(sd_unet(), sd_vae(), sd_text())
    for state, name, predicts in ((v2, "epsilon", "epsilon"), (v1, "v", "v_prediction")):
        save_file(
            state, tmp_path / "x.safetensors", {"modelspec.prediction_type": name} if told == "modelspec" else None
        )
        options = {"prediction_type": predicts} if told == "argument" else {}
        model = load_model(str(tmp_path / "x.safetensors"), **options)
        assert model.scheduler["prediction_type"] == predicts and model.unet.config["sample_size"] == 64
    assert capsys.readouterr().out == ""
    save_file(v2, tmp_path / "x.safetensors", {"modelspec.prediction_type": "v"})
    again = load_model(str(tmp_path / "x.safetensors"), prediction_type="epsilon")
    assert again.scheduler["prediction_type"] == "epsilon"  # the argument goes before


def test_the_prediction_type_of_a_folder_may_be_corrected(model_folder):
    model = load_model(str(model_folder), prediction_type="v_prediction")
    assert model.scheduler == {**load_model(str(model_folder)).scheduler, "prediction_type": "v_prediction"}
    assert "prediction_type is 'eps'; choose one of" in refusal(load_model, str(model_folder), prediction_type="eps")


def test_the_tokenizer_of_a_file_offline_and_given(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_file(original(sd_unet(True), sd_vae(), sd_text(True)), path)

    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    message = refusal(load_model, str(path))
    assert f"{path} holds no tokenizer" in message and "tokenizer=./folder" in message and "no route" in message
    message = refusal(load_text_tokenizer, str(path), sd_text(True), "text_encoder.pretrained")
    assert "text_encoder.pretrained=./folder" in message
    tiny.tokenizer().save_pretrained(tmp_path / "clip")
    assert load_model(str(path), tokenizer=str(tmp_path / "clip")).tokenizer.pad_token_id == 0
    tiny.write_model_folder(tmp_path / "model")
    assert load_model(str(path), tokenizer=str(tmp_path / "model")).tokenizer.pad_token_id == 0
    assert f"tokenizer={tmp_path / 'model' / 'vae'} holds no tokenizer" in refusal(
        load_model, str(path), tokenizer=str(tmp_path / "model" / "vae")
    )


def test_an_ema_and_the_weights_beside_it(tmp_path, clip_on_the_hub):
    ema, unet = sd_unet(), tiny.scrambled(sd_unet(), seed=7)
    state = original(unet, sd_vae(), sd_text())
    for name, tensor in original(ema).items():
        state["model_ema." + name.removeprefix("model.").replace(".", "")] = tensor
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3), "betas": torch.ones(9)}
    save_file(state, tmp_path / "x.safetensors")
    assert_same_network(load_model(str(tmp_path / "x.safetensors")).unet, ema)


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_a_file_of_a_vae_alone(tmp_path, prefix):
    vae = sd_vae()
    state = {prefix + name.removeprefix("first_stage_model."): t for name, t in original(vae).items()}
    save_file(state, tmp_path / "vae.safetensors")
    torch.save({"state_dict": state}, tmp_path / "vae.pt")
    for name in ("vae.safetensors", "vae.pt"):
        assert_same_network(load_part(AutoencoderKL, str(tmp_path / name)), vae)
    assert "vae.safetensors holds no unet (only: vae)" in refusal(load_part, UNet, str(tmp_path / "vae.safetensors"))
    assert "holds no unet" in refusal(load_model, str(tmp_path / "vae.safetensors"))


def test_parts_of_whole_files(tmp_path):
    unet, vae, text = sd_unet(), sd_vae(), sd_text()
    save_file(original(unet, vae, text), tmp_path / "x.safetensors")
    for network, expected in ((UNet, unet), (AutoencoderKL, vae), (TextTower, text)):
        assert_same_network(load_part(network, str(tmp_path / "x.safetensors")), expected)
    assert "holds no clip" in refusal(load_part, CLIP, str(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("part", PARTS)
def test_the_file_of_a_network_beside_its_config(model_folder, part):
    (file,) = (model_folder / part).glob("*.safetensors")
    network = {"unet": UNet, "vae": AutoencoderKL, "text_encoder": TextTower}[part]
    assert_same_network(load_part(network, str(file)), load_network(network, model_folder / part))
    (model_folder / part / "config.json").unlink()
    assert f"this is a {part} without its config: a config.json must lie beside it" in refusal(
        load_part, network, str(file)
    )


def test_a_text_encoder_out_of_the_file_of_a_clip(tmp_path):
    clip = tiny.clip()
    save_network(clip, tmp_path)
    assert_same_network(load_part(TextTower, str(tmp_path / "model.safetensors")), clip.text_model)


# ---------------------------------------------------------------------------------------------------------- mixing


def test_parts_may_be_mixed(model_folder, tmp_path):
    vae, text, unet = tiny.vae(seed=11), tiny.text_tower(seed=12), tiny.unet(seed=13)
    save_network(vae, tmp_path / "vae")
    save_network(text, tmp_path / "text")
    write_folder(tmp_path / "other" / "model", unet, tiny.vae(), tiny.text_tower())
    own = load_model(str(model_folder))
    mixed = load_model(
        str(model_folder), vae=str(tmp_path / "vae"), text_encoder=str(tmp_path / "text"), unet=str(tmp_path / "other")
    )
    assert_same_network(mixed.vae, vae)
    assert_same_network(mixed.text_tower, text)
    assert_same_network(mixed.unet, unet)
    assert mixed.unet_file.is_relative_to(tmp_path / "other") and mixed.scheduler == own.scheduler
    assert_same_network(load_model(str(model_folder), vae=str(tmp_path / "vae")).unet, own.unet)
    assert_same(load_model(str(model_folder), vae="", text_encoder="", unet="", tokenizer=""), own)  # typed as `vae=`


def test_parts_of_files_and_folders_may_be_mixed(model_folder, tmp_path):
    save_single_file(load_model(str(model_folder)), tmp_path / "one.safetensors")
    unet = tiny.unet(seed=13)
    write_folder(tmp_path / "other", unet, tiny.vae(seed=11), tiny.text_tower())
    mixed = load_model(str(tmp_path / "one.safetensors"), unet=str(tmp_path / "other"))
    assert_same_network(mixed.unet, unet)
    mixed = load_model(str(tmp_path / "other"), vae=str(tmp_path / "one.safetensors"))
    assert_same_network(mixed.vae, tiny.vae())
    save_file(original(sd_unet()), tmp_path / "unet.safetensors")
    message = refusal(load_model, str(tmp_path / "unet.safetensors"))
    assert "unet.safetensors holds no vae (only: unet)" in message
    mixed = load_model(str(tmp_path / "other"), unet=str(tmp_path / "unet.safetensors"), text_encoder=str(
        write_folder(tmp_path / "wide", sd_unet(), sd_vae(), sd_text())))  # fmt: skip
    assert_same_network(mixed.unet, sd_unet())


def test_a_text_encoder_brings_its_tokenizer(model_folder, tmp_path):
    from ldm.conditioner import train_tokenizer

    tokenizer = train_tokenizer(["blau und grün"], 530, 12)
    clip = CLIP({**tiny.text_options(), "vocab_size": 530}, tiny.VISION, projection_dim=8)
    save_network(clip, tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    model = load_model(str(model_folder), text_encoder=str(tmp_path / "clip"))
    assert len(model.tokenizer) == len(tokenizer) != len(tiny.tokenizer())
    model = load_model(str(model_folder), text_encoder=str(tmp_path / "clip"), tokenizer=str(model_folder))
    assert len(model.tokenizer) == len(tiny.tokenizer())
    save_single_file(load_model(str(model_folder), text_encoder=str(tmp_path / "clip")), tmp_path / "x.safetensors")
    model = load_model(str(model_folder), text_encoder=str(tmp_path / "x.safetensors"))
    assert len(model.tokenizer) == len(tokenizer)


# -------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("unet", "message"),
    [
        ({"cross_attention_dim": 24}, "the U-Net listens to context of width 24, the text encoder gives 16"),
        ({"out_channels": 8}, "the U-Net predicts 8 channels, the VAE has 4 latent channels"),
        ({"in_channels": 5}, "in_channels=5, .* a depth-to-image model"),
        ({"in_channels": 8}, "in_channels=8, .* an InstructPix2Pix model"),
        ({"in_channels": 7}, "in_channels=7, .* an upscaler"),
        ({"in_channels": 6}, "in_channels=6, .* no U-Net for this VAE"),
    ],
)
def test_parts_that_do_not_fit_one_another(tmp_path, unet, message):
    tiny.write_model_folder(tmp_path, **unet)
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path))


def test_an_inpainting_model_is_a_model(tmp_path):
    tiny.write_model_folder(tmp_path, in_channels=9)
    assert load_model(str(tmp_path)).unet.config["in_channels"] == 9


@pytest.mark.parametrize(
    ("class_name", "more"),
    [
        ("StableDiffusionXLPipeline", {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}),
        ("StableDiffusion3Pipeline", {"transformer": ["diffusers", "SD3Transformer2DModel"]}),
        ("StableDiffusionControlNetPipeline", {"controlnet": ["diffusers", "ControlNetModel"]}),
        ("StableDiffusionUpscalePipeline", {"low_res_scheduler": ["diffusers", "DDPMScheduler"]}),
    ],
)
def test_pipelines_of_another_kind_are_named(model_folder, class_name, more):
    index = json.loads((model_folder / "model_index.json").read_text())
    (model_folder / "model_index.json").write_text(json.dumps({**index, "_class_name": class_name, **more}))
    assert f"is a {class_name} and works with {next(iter(more))} too" in refusal(load_model, str(model_folder))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lora_unet_down_blocks_0_attentions_0.lora_up.weight"], "a LoRA"),
        (["unet.down_blocks.0.attentions.0.to_q.lora_A.weight"], "a LoRA"),
        (["control_model.input_hint_block.0.weight"], "a ControlNet"),
        (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "a ControlNet"),
        (["conditioner.embedders.1.model.ln_final.weight", "model.diffusion_model.out.0.weight"], "an SDXL checkpoint"),
        (["emb_params"], "a textual inversion"),
        (["anything", "else"], "not recognised"),
    ],
)
@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
def test_files_of_another_kind_are_named(tmp_path, names, message, ending):
    state = {name: torch.zeros(2) for name in names}
    path = tmp_path / f"x.{ending}"
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    for load in (load_model, lambda source: load_part(UNet, source)):
        found = refusal(load, str(path))
        assert found.startswith(f"{path}: ") and message in found


def test_single_files_are_loaded_strictly(tmp_path, clip_on_the_hub):
    whole, path = original(sd_unet(), sd_vae(), sd_text()), str(tmp_path / "x.safetensors")

    def told(change) -> str:
        state = dict(whole)
        change(state)
        save_file(state, path)
        return refusal(load_model, path)

    name = "model.diffusion_model.output_blocks.1.0.in_layers.2.weight"
    assert "1 missing (up_blocks.0.resnets.1.conv1.weight)" in told(lambda state: state.pop(name))
    surplus = told(lambda state: state.update({"model.diffusion_model.extra.weight": torch.zeros(1)}))
    assert "1 surplus (extra.weight)" in surplus
    assert "up_blocks.0.resnets.1.conv1.weight is (3, 3), expected (64, " in told(
        lambda state: state.update({name: torch.zeros(3, 3)})
    )
    assert "is torch.int64" in told(lambda state: state.update({name: state[name].long()}))
    assert "of no part" in told(lambda state: state.update({"stranger": torch.zeros(1)}))


def test_a_model_folder_that_lacks_something_names_it(model_folder):
    for name in ("tokenizer/tokenizer.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"):
        text = (model_folder / name).read_text()
        (model_folder / name).unlink()
        assert name.split("/")[0] in refusal(load_model, str(model_folder))
        (model_folder / name).write_text(text)
    shutil.rmtree(model_folder / "vae")
    assert "vae/config.json is missing" in refusal(load_model, str(model_folder))


# -------------------------------------------------------------------------------------------------------- metadata


def test_a_file_of_ours_says_what_it_is(tmp_path):
    save_single_file(load_model(str(tiny.write_model_folder(tmp_path / "m"))), tmp_path / "shapes.safetensors")
    with safe_open(tmp_path / "shapes.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["kind"] == "single_file"
    assert metadata["ldm_version"] == __version__ and len(metadata["config_hash"]) == 12
    assert json.loads(metadata["configs"])["unet"]["block_out_channels"] == [16, 32]
    assert metadata["modelspec.sai_model_spec"] == "1.0.0" and metadata["modelspec.title"] == "shapes"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["modelspec.prediction_type"] == "epsilon"
    assert not any("date" in name for name in metadata)


@pytest.fixture(scope="module")
def our_file(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("ours")
    save_single_file(load_model(str(tiny.write_model_folder(place / "m"))), place / "x.safetensors")
    return place / "x.safetensors"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("configs", "{"),
        ("configs", "[]"),
        ("configs", '{"unet": 3}'),
        ("configs", '{"unet": {"an_option": 1}}'),
        ("configs", '{"unet": {"block_out_channels": "wide"}}'),
        ("configs", '{"unet": {"layers_per_block": -1}}'),
        ("configs", '{"vae": {"latent_channels": null}}'),
        ("configs", '{"text_encoder": {"num_hidden_layers": "x"}}'),
        ("configs", '{"text_encoder": {"num_hidden_layers": 1000000000}}'),
        ("configs", '{"text_encoder": {"hidden_act": ["gelu"]}}'),
        ("scheduler", "3"),
        ("scheduler", "os.system('touch owned')"),
        ("settings", "[" * 100_000),
        ("tokenizer", '{"tokenizer.json": 1}'),
        ("tokenizer", '{"tokenizer.json": "{}"}'),
        ("tokenizer", '{"tokenizer.json": "\\ud800"}'),
        ("tokenizer", '{"../../evil.json": "{}", "tokenizer.json": "[]"}'),
    ],
)
def test_metadata_are_data_from_anywhere(our_file, tmp_path, name, text):
    write_weights(tmp_path / "x.safetensors", load_file(our_file), {**read_metadata(our_file), name: text})
    assert str(tmp_path / "x.safetensors") in refusal(load_model, str(tmp_path / "x.safetensors"))
    assert not list(tmp_path.parent.rglob("evil.json"))


def test_nothing_that_metadata_say_is_run(our_file, tmp_path):
    configs = json.loads(read_metadata(our_file)["configs"])
    configs["unet"] |= {"_target_": "os.system", "_class_name": "os.system"}
    metadata = {**read_metadata(our_file), "configs": json.dumps(configs)}
    write_weights(tmp_path / "x.safetensors", load_file(our_file), metadata)
    assert_same(load_model(str(tmp_path / "x.safetensors")), load_model(str(our_file)))


def test_metadata_of_other_tools_are_passed_over(tmp_path, clip_on_the_hub):
    state = original(sd_unet(), sd_vae(), sd_text())
    save_file(state, tmp_path / "x.safetensors", {"tokenizer": "bpe", "configs": "none", "scheduler": "cosine"})
    assert load_model(str(tmp_path / "x.safetensors")).scheduler["beta_schedule"] == "scaled_linear"


# --------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("save", [save_model, save_single_file])
def test_a_disk_that_is_full_leaves_nothing_half_written(model_folder, tmp_path, save, monkeypatch):
    model, place = load_model(str(model_folder)), tmp_path / "new" / "x.safetensors"
    place.parent.mkdir()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert refusal(save, model, place) == f"{place} cannot be written: No space left on device"
    assert not list(place.parent.iterdir())
    monkeypatch.undo()
    save(model, place)
    before = sorted((path.name, path.stat().st_size) for path in tmp_path.rglob("*"))
    monkeypatch.setattr("os.fsync", full)
    refusal(save, model, place)
    assert sorted((path.name, path.stat().st_size) for path in tmp_path.rglob("*")) == before


def test_a_tokenizer_that_cannot_be_written(model_folder, tmp_path, monkeypatch):
    model = load_model(str(model_folder))

    def full(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # as tokenizers says it

    monkeypatch.setattr(type(model.tokenizer), "save_pretrained", full)
    assert "cannot be written: No space left" in refusal(save_model, model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_parameter_without_an_original_name_cannot_be_written(model_folder, tmp_path):
    model = load_model(str(model_folder))
    model.unet.register_parameter("stranger", torch.nn.Parameter(torch.zeros(1)))
    assert "stranger has no name" in refusal(save_single_file, model, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_transformers_opens_the_text_encoder_and_the_tokenizer(folder, tmp_path):
    save_single_file(load_model(str(folder)), tmp_path / "x.safetensors")
    save_model(load_model(str(tmp_path / "x.safetensors")), tmp_path / "out")
    theirs = transformers.CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder").eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    ids = tokenizer(PROMPTS, padding="max_length", max_length=12, return_tensors="pt").input_ids
    model = load_model(str(folder))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).last_hidden_state, model.text_tower(ids)[0], rtol=0, atol=1e-5)
