import json
import logging
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ldm
import tiny
from ldm.diffusion.schedule import FlowSchedule, NoiseSchedule
from ldm.errors import UserError
from ldm.files import load_json
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.clip import CLIP, TextTower
from ldm.nn.unet import UNet
from ldm.scheduler import read_scheduler
from ldm.weights.folder import load_network, save_network, save_pipeline_index

WEIGHTS = {UNet: "diffusion_pytorch_model", AutoencoderKL: "diffusion_pytorch_model", TextTower: "model", CLIP: "model"}
MAKE = {UNet: tiny.unet, AutoencoderKL: tiny.vae, TextTower: tiny.text_tower, CLIP: tiny.clip}
THEIRS = {
    UNet: diffusers.UNet2DConditionModel,
    AutoencoderKL: diffusers.AutoencoderKL,
    TextTower: transformers.CLIPTextModel,
    CLIP: transformers.CLIPModel,
}
NETWORKS = pytest.mark.parametrize("network", MAKE, ids=lambda network: network.__name__)

GENERATOR = torch.Generator().manual_seed(0)
LATENTS, CONTEXT = torch.randn(2, 4, 8, 8, generator=GENERATOR), torch.randn(2, 12, 16, generator=GENERATOR)
IMAGE = torch.rand(2, 3, 16, 16, generator=GENERATOR) * 2 - 1
IDS = tiny.tokenizer()(["a red circle", ""], padding="max_length", max_length=12, return_tensors="pt")["input_ids"]


@torch.no_grad()
def outputs(model) -> list[torch.Tensor]:
    """Run a network of ours or its counterpart."""
    match model:
        case UNet():
            return [model(LATENTS, torch.tensor([3, 700]), CONTEXT)]
        case diffusers.UNet2DConditionModel():
            return [model(LATENTS, torch.tensor([3, 700]), CONTEXT).sample]
        case AutoencoderKL():
            return [model.encode(IMAGE), model.decode(LATENTS)]
        case diffusers.AutoencoderKL():
            return [model.encode(IMAGE).latent_dist.parameters, model.decode(LATENTS).sample]
        case TextTower():
            return list(model(IDS))
        case transformers.CLIPTextModel():
            result = model(IDS)
            return [result.last_hidden_state, result.pooler_output]
        case CLIP():
            return [model(IDS, IMAGE)]
        case transformers.CLIPModel():
            return [model(input_ids=IDS, pixel_values=IMAGE).logits_per_image]
    raise TypeError(type(model))


def assert_same(one, other, atol=1e-5):
    for a, b in zip(outputs(one), outputs(other), strict=True):
        assert a.abs().max() > 1e-2  # an answer of zeros would prove nothing
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def their_model(network):
    """Build the other library's model from its own config class, with random weights everywhere."""
    if network in (UNet, AutoencoderKL):
        return tiny.scrambled(THEIRS[network].from_config(MAKE[network]().config))
    ids = {"bos_token_id": None}
    text = {**tiny.text_options(), **ids}
    if network is TextTower:
        return tiny.scrambled(transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)))
    config = transformers.CLIPConfig(text_config=text, vision_config=tiny.VISION, projection_dim=8)
    return tiny.scrambled(transformers.CLIPModel(config))


@pytest.fixture
def saved(tmp_path):
    """Write a network of ours; returns its folder and the network."""

    def write(network, name="part", **options):
        model = MAKE[network](**options)
        save_network(model, tmp_path / name)
        return tmp_path / name, model

    return write


# ---------------------------------------------------------------------------------------- in and out of other tools


@NETWORKS
def test_other_tools_open_what_we_write(saved, network):
    folder, ours = saved(network)
    theirs, report = THEIRS[network].from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert_same(ours, theirs.eval())


@NETWORKS
def test_nothing_is_said_when_other_tools_open_what_we_write(saved, network, monkeypatch):
    folder, _ = saved(network)
    told: list[str] = []
    for library in ("diffusers", "transformers"):
        handler = logging.Handler()
        handler.emit = lambda record: told.append(record.getMessage())
        monkeypatch.setattr(logging.getLogger(library), "handlers", [handler])
    THEIRS[network].from_pretrained(folder)
    assert told == []


@NETWORKS
def test_we_open_what_other_tools_write(tmp_path, network):
    theirs = their_model(network)
    theirs.save_pretrained(tmp_path)
    ours = load_network(network, tmp_path)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert_same(ours, theirs)


@NETWORKS
def test_we_open_weights_in_several_files(tmp_path, network):
    theirs = their_model(network)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same(load_network(network, tmp_path), theirs)


@pytest.mark.parametrize("shard_size", ["20KB", "1GB"])
@pytest.mark.parametrize(
    ("network", "safe"),
    # Today's transformers writes safetensors alone.
    [*((network, True) for network in (UNet, AutoencoderKL, TextTower, CLIP)), (UNet, False), (AutoencoderKL, False)],
)
def test_we_open_variants_and_pickles(tmp_path, network, shard_size, safe, capsys):
    theirs = their_model(network)
    options = {} if safe else {"safe_serialization": False}
    theirs.half().save_pretrained(tmp_path / "half", variant="fp16", max_shard_size=shard_size, **options)
    half = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    tiny.scrambled(theirs.float(), seed=9).save_pretrained(tmp_path, max_shard_size=shard_size, **options)
    for file in (tmp_path / "half").iterdir():
        file.rename(tmp_path / file.name)
    assert_same(load_network(network, tmp_path), theirs)
    found = load_network(network, tmp_path, None, "fp16")
    for name, tensor in found.state_dict().items():
        name = name if name in half else f"text_model.{name}"
        assert tensor.dtype == torch.float16 and torch.equal(tensor, half[name]), name
    assert capsys.readouterr().out == ""


def test_a_variant_that_is_alone_or_not_there_is_said(tmp_path, capsys):
    theirs = their_model(UNet)
    theirs.save_pretrained(tmp_path / "fp16", variant="fp16")
    theirs.save_pretrained(tmp_path / "plain")
    assert_same(load_network(UNet, tmp_path / "fp16"), theirs)
    assert "holds fp16 alone: diffusion_pytorch_model.fp16.safetensors is taken" in capsys.readouterr().out
    assert_same(load_network(UNet, tmp_path / "plain", variant="fp16"), theirs)
    assert "holds no variant fp16: diffusion_pytorch_model.safetensors is taken" in capsys.readouterr().out
    (tmp_path / "ema").mkdir()
    theirs.save_pretrained(tmp_path / "ema", variant="non_ema")
    with pytest.raises(UserError, match="holds no weights"):
        load_network(UNet, tmp_path / "ema")


def test_the_clip_repositories_of_openai(tmp_path):
    """Both towers, in a pickle and with what transformers once stored beside them."""
    theirs = their_model(CLIP)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for name in ("text_model", "vision_model"):
        state[f"{name}.embeddings.position_ids"] = torch.arange(12)[None]
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same(load_network(CLIP, tmp_path), theirs)
    with torch.no_grad():
        expected = theirs.text_model(IDS).last_hidden_state
        torch.testing.assert_close(load_network(TextTower, tmp_path)(IDS)[0], expected, rtol=0, atol=1e-5)


@NETWORKS
def test_round_trip_is_bit_equal(saved, network):
    folder, model = saved(network)
    again = load_network(network, folder)
    assert again.config == model.config
    assert not again.training
    for (name, tensor), (name_again, other) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == name_again and torch.equal(tensor, other), name


def test_a_vae_with_the_attention_names_of_old_diffusers(tmp_path):
    model = tiny.vae()
    save_network(model, tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state, renamed = load_file(path), 0
    for new, old in names.items():
        renamed += sum(new in name for name in state)
        state = {name.replace(new, old): tensor for name, tensor in state.items()}
    assert renamed == 2 * 4 * 2
    save_file(state, path)
    assert_same(load_network(AutoencoderKL, tmp_path), model)
    assert_same(model, diffusers.AutoencoderKL.from_pretrained(tmp_path))


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_text_encoder_of_either_naming_with_position_ids(tmp_path, prefixed):
    model = tiny.text_tower()
    save_network(model, tmp_path)
    prefix = "text_model." if prefixed else ""
    state = {prefix + name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    state[f"{prefix}embeddings.position_ids"] = torch.arange(12)[None]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    assert_same(load_network(TextTower, tmp_path), model)


def test_a_text_encoder_with_a_projection(tmp_path):
    theirs = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**tiny.text_options(), bos_token_id=None, projection_dim=8)
    )
    tiny.scrambled(theirs).save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(IDS).last_hidden_state
        torch.testing.assert_close(load_network(TextTower, tmp_path)(IDS)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("writer", ["ours", "theirs"])
def test_a_whole_clip_serves_as_text_encoder(tmp_path, writer):
    model = tiny.clip() if writer == "ours" else their_model(CLIP)
    save_network(model, tmp_path) if writer == "ours" else model.save_pretrained(tmp_path)
    assert_same(load_network(TextTower, tmp_path), load_network(CLIP, tmp_path).text_model)


def test_a_clip_whose_text_options_are_given_twice(tmp_path):
    model = tiny.clip()
    save_network(model, tmp_path)
    config = load_json(tmp_path / "config.json")
    config["text_config_dict"], config["text_config"] = config["text_config"], {"hidden_size": 512}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for network in (CLIP, TextTower):
        load_network(network, tmp_path)


# ----------------------------------------------------------------------------------------------- what loading gives


@NETWORKS
def test_loaded_weights_are_whole_trainable_and_apart_from_the_file(saved, network):
    folder, _ = saved(network)
    before = (folder / f"{WEIGHTS[network]}.safetensors").read_bytes()
    model = load_network(network, folder)
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert (folder / f"{WEIGHTS[network]}.safetensors").read_bytes() == before
    save_network(model, folder)  # over the file it was loaded from
    assert all((p == 7).all() for p in load_network(network, folder).parameters())


@NETWORKS
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_are_float32_whatever_the_file_holds(tmp_path, network, stored):
    save_network(MAKE[network]().to(stored), tmp_path)
    model = load_network(network, tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.dtype for p in load_network(network, tmp_path, torch.bfloat16).parameters()} == {torch.bfloat16}
    assert_same(model, MAKE[network](), atol=0.1)


@NETWORKS
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_kept_where_nothing_else_is_asked_for(tmp_path, network, stored):
    model = MAKE[network]()
    save_network(model, tmp_path, stored)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    found = load_network(network, tmp_path, None)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor.to(stored))


def test_channels_last_weights_are_written_plainly(tmp_path):
    save_network(tiny.vae().to(memory_format=torch.channels_last), tmp_path)
    assert_same(load_network(AutoencoderKL, tmp_path), tiny.vae(), atol=0)


# ------------------------------------------------------------------------------------------------------- refusals


def edit_weights(folder: Path, change) -> None:
    (path,) = folder.glob("*.safetensors")
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


def edit_config(folder: Path, **options) -> None:
    config = load_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, **options}))


@NETWORKS
def test_missing_and_surplus_keys_and_other_shapes_are_named_together(saved, network):
    folder, model = saved(network)
    prefix = "text_model." if network is TextTower else ""
    first, second, *_ = model.state_dict()

    def change(state):
        del state[prefix + first]
        state[f"{prefix}surprise.weight"] = torch.zeros(1)
        state[prefix + second] = torch.zeros(3, 3)

    edit_weights(folder, change)
    with pytest.raises(UserError) as caught:
        load_network(network, folder)
    message = str(caught.value)
    assert str(folder) in message and "the weights do not fit the config" in message
    assert f"1 missing ({first})" in message and "1 surplus (surprise.weight)" in message
    assert f"{second} is (3, 3), expected {tuple(model.state_dict()[second].shape)}" in message


def test_weights_that_are_no_floating_point_are_refused(saved):
    folder, model = saved(UNet)
    name = next(iter(model.state_dict()))
    edit_weights(folder, lambda state: state.update({name: state[name].to(torch.int8)}))
    with pytest.raises(UserError, match=rf"1 of another type \({name} is torch.int8\)"):
        load_network(UNet, folder)


def test_many_differences_are_counted(saved):
    folder, _ = saved(UNet)
    edit_config(folder, block_out_channels=[32, 64])
    with pytest.raises(UserError, match=r"expected .*; \d+ more of another shape"):
        load_network(UNet, folder)
    edit_weights(folder, lambda state: [state.pop(name) for name in list(state)[1:]])
    with pytest.raises(UserError, match=r"\d+ missing \(.*, …\)"):
        load_network(UNet, folder)


@NETWORKS
@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_weights(saved, network, keep):
    folder, _ = saved(network)
    path = folder / f"{WEIGHTS[network]}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=rf"{path.name} cannot be read, it may be cut short"):
        load_network(network, folder)


@pytest.mark.parametrize(
    ("network", "option", "value"),
    [
        (UNet, "class_embed_type", "timestep"),
        (UNet, "addition_embed_type", "text_time"),
        (UNet, "mid_block_type", "UNetMidBlock2D"),
        (UNet, "an_option_of_tomorrow", 1),
        (AutoencoderKL, "latents_mean", [0.0]),
        (AutoencoderKL, "act_fn", "tanh"),
        (TextTower, "hidden_act", "relu6"),
        (TextTower, "attention_dropout", 0.1),
    ],
)
def test_unsupported_options_are_named(saved, network, option, value):
    folder, _ = saved(network)
    edit_config(folder, **{option: value})
    with pytest.raises(UserError, match=rf"part/config.json: .*{option}=.*not (supported|known)"):
        load_network(network, folder)


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (UNet, {"_class_name": "ControlNetModel"}, "part holds a ControlNetModel; a unet must be a UNet2DCondition"),
        (UNet, {"_class_name": "AutoencoderKL"}, "part holds a AutoencoderKL; a unet must be"),
        (AutoencoderKL, {"_class_name": "AutoencoderTiny"}, "part holds a AutoencoderTiny; a vae must be"),
        (TextTower, {"model_type": "t5"}, "part holds a t5; a text_encoder must be a clip_text_model or clip"),
        (CLIP, {"model_type": "clip_text_model"}, "part holds a clip_text_model; a clip must be a clip"),
    ],
)
def test_networks_of_other_classes_are_named(saved, network, options, message):
    folder, _ = saved(network)
    edit_config(folder, **options)
    with pytest.raises(UserError, match=message):
        load_network(network, folder)


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (UNet, {"block_out_channels": None}),
        (UNet, {"block_out_channels": "wide"}),
        (UNet, {"block_out_channels": [16, -32]}),
        (UNet, {"norm_num_groups": 0}),
        (UNet, {"norm_num_groups": 7}),
        (UNet, {"attention_head_dim": 0}),
        (UNet, {"attention_head_dim": [2, None]}),
        (UNet, {"layers_per_block": "two"}),
        (AutoencoderKL, {"latent_channels": "4"}),
        (AutoencoderKL, {"block_out_channels": 8}),
        (TextTower, {"hidden_size": "wide"}),
        (TextTower, {"num_attention_heads": 0}),
        (TextTower, {"vocab_size": -1}),
        (CLIP, {"text_config": [1]}),
        (CLIP, {"projection_dim": None}),
    ],
)
def test_configs_of_wrong_values_are_refused(saved, network, options):
    folder, _ = saved(network)
    edit_config(folder, **options)
    with pytest.raises(UserError, match=r"config.json"):
        load_network(network, folder)


def test_folders_without_config_or_weights(tmp_path, saved):
    with pytest.raises(UserError, match=r"config.json is missing"):
        load_network(UNet, tmp_path / "nothing")
    folder, _ = saved(UNet)
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(UserError, match=r"holds no weights .*safetensors"):
        load_network(UNet, folder)
    (folder / "diffusion_pytorch_model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"holds no weights .*safetensors"):
        load_network(UNet, folder)


def test_nothing_that_a_folder_says_is_run(tmp_path, saved):
    """Dotted paths and pickles in a folder are text and bytes."""
    folder, model = saved(TextTower)
    edit_config(folder, auto_map={"AutoModel": "evil.Evil"}, _target_="os.system", architectures=["os.system"])
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    (folder / "evil.py").write_text("raise SystemExit('run')")
    assert_same(load_network(TextTower, folder), model)


# --------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_scheduler_keeps_what_the_model_was_trained_with(tmp_path, prediction_type, beta_schedule):
    schedule = NoiseSchedule(beta_schedule, 0.001, 0.01, 500)
    save_network(tiny.unet(), tmp_path / "unet")
    save_pipeline_index(tmp_path, schedule, prediction_type, {"steps": 3})
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    torch.testing.assert_close(theirs.alphas_cumprod, schedule.alphas_cumprod.float(), rtol=1e-5, atol=1e-7)
    assert theirs.config.prediction_type == prediction_type
    assert not theirs.config.clip_sample and not theirs.config.thresholding
    ours = NoiseSchedule.from_config(load_json(tmp_path / "scheduler" / "scheduler_config.json"))
    assert torch.equal(ours.alphas_cumprod, schedule.alphas_cumprod)
    assert load_json(tmp_path / "ldm.json") == {"steps": 3}


def test_the_scheduler_keeps_that_a_model_is_a_flow(tmp_path):
    save_network(tiny.unet(), tmp_path / "unet")
    save_pipeline_index(tmp_path, FlowSchedule(500, 2.0), "flow_prediction", {"steps": 3})
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert (theirs.config.num_train_timesteps, theirs.config.shift) == (500, 2.0)
    schedule, prediction_type, _, sampler = read_scheduler(load_json(tmp_path / "scheduler" / "scheduler_config.json"))
    assert isinstance(schedule, FlowSchedule) and schedule.config == {"num_train_timesteps": 500, "shift": 2.0}
    assert (prediction_type, sampler) == ("flow_prediction", "euler")
    index = load_json(tmp_path / "model_index.json")
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]


@pytest.mark.parametrize(
    ("in_channels", "pipeline"), [(4, "StableDiffusionPipeline"), (9, "StableDiffusionInpaintPipeline")]
)
def test_the_index_says_whether_a_model_is_for_inpainting(tmp_path, in_channels, pipeline):
    save_network(tiny.unet(in_channels=in_channels), tmp_path / "unet")
    save_pipeline_index(tmp_path, NoiseSchedule(), "epsilon", {})
    assert load_json(tmp_path / "model_index.json")["_class_name"] == pipeline


def test_files_say_what_they_are(saved):
    found = {}
    for network in MAKE:
        folder, _ = saved(network, network.__name__)
        with safe_open(folder / f"{WEIGHTS[network]}.safetensors", "pt") as file:
            found[network] = file.metadata()
    assert [each["kind"] for each in found.values()] == ["unet", "vae", "text_encoder", "clip"]
    assert len({each["config_hash"] for each in found.values()}) == 4
    assert all(each["format"] == "pt" and each["ldm_version"] == ldm.__version__ for each in found.values())


def test_the_index_names_parts_that_other_tools_know(tmp_path):
    model = tiny.write_model_folder(tmp_path / "model")
    index = load_json(model / "model_index.json")
    parts = {name: value for name, value in index.items() if not name.startswith("_") and isinstance(value, list)}
    parts = {name: value for name, value in parts.items() if value != [None, None]}
    assert set(parts) == {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    for name, (library, class_name) in parts.items():
        assert hasattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)
        assert (model / name).is_dir()
