"""Every option of every group composes, passes the schema, and builds what it describes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from ldm import cli
from ldm.config import HubData, TrainConfig, check
from ldm.errors import UserError
from ldm.nn.autoencoder import AutoencoderKL
from ldm.training import fit, networks
from ldm.training.autoencoder import AutoencoderModule
from ldm.training.optim import build_optimizer
from ldm.weights import folder as weights
from peers import write_hub
from runs import SMALL, compose_values, run_script, tiny_config


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (cli.CONF_DIR / group).glob("[!_]*.yaml"))


# What an option cannot know by itself.
NEEDS = {case: ["data.path=some/set"] for case in ("data=hub", "data=folder", "data=shards", "experiment=pictures")} | {
    "data=mix": ["+source@data.sources.a=folder", "data.sources.a.path=some/set"]
}
# A VAE or text encoder that is loaded is not trained.
NEEDS |= {"optim=schedule_free": ["diffusion.ema_decay=0"]}  # it averages by itself
NEEDS |= {"vae=sd": ["stages=[clip,diffusion]"], "text_encoder=clip_l": ["stages=[autoencoder,diffusion]"]}
EXPERIMENTS = options("experiment")
CASES = [
    f"{group}={option}"
    for group in (
        "data",
        "vae",
        "text_encoder",
        "unet",
        "diffusion",
        "optim",
        "trainer",
        "logger",
        "callbacks",
        "perceptual",
        "discriminator",
    )
    for option in options(group)
]


def composed(*overrides: str) -> TrainConfig:
    overrides = (*overrides, *(extra for override in overrides for extra in NEEDS.get(override, [])))
    return check(TrainConfig, compose_values("train", overrides))


def params(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def build_all(config: TrainConfig) -> dict[str, nn.Module]:
    """Build every network of a config on the meta device; pretrained ones have the published sizes."""
    built: dict[str, nn.Module] = {}
    with torch.device("meta"):
        if config.vae.pretrained:
            vae = AutoencoderKL(
                block_out_channels=[128, 256, 512, 512],
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                layers_per_block=2,
            )
        else:
            vae = built["vae"] = networks.build_vae(config)
        if config.unet.pretrained:  # the options beside it are those of what it will load
            config = config.model_copy(update={"unet": config.unet.model_copy(update={"pretrained": None})})
        width = config.text_encoder.text.hidden_size if config.text_encoder.text else 768
        built["unet"] = networks.build_unet(config, vae, config.unet.cross_attention_dim or width)
    networks.check_networks(config, config.stages)
    return built


@pytest.mark.parametrize("debug", [None, *options("debug")])
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment(experiment, debug):
    config = composed(f"experiment={experiment}", *([f"debug={debug}"] if debug else []))
    assert config.name == ("debug" if debug else experiment)
    assert Path(config.run_dir) == Path(config.output_dir) / config.name
    if debug == "fast":
        assert config.trainer.max_steps == config.autoencoder.max_steps == config.clip.max_steps == 3
    if debug == "overfit":
        assert config.trainer.overfit_batches == 1
    build_all(config)
    for optim in (config.optim, config.autoencoder.optim, config.clip.optim):
        build_optimizer(nn.Linear(2, 2), optim, 10)


@pytest.mark.parametrize("case", CASES)
def test_every_option_composes_and_passes_the_schema(case):
    build_all(composed(case, "data.resolution=64"))  # a size that every network can halve


def test_the_built_in_experiment_is_the_default_world():
    shapes = composed("experiment=shapes")
    assert shapes.data.kind == "shapes" and shapes.stages == ["autoencoder", "clip", "diffusion"]
    assert shapes.data.resolution >= 32


def test_pokemon_is_what_it_says():
    config = composed("experiment=pokemon")
    assert isinstance(config.data, HubData) and config.data.path == "reach-vb/pokemon-blip-captions"
    assert config.data.resolution == 512 and config.stages == ["diffusion"]
    assert config.vae.pretrained and config.text_encoder.pretrained and not config.unet.pretrained


def test_pokemon_finetune_goes_on_from_stable_diffusion():
    config = composed("experiment=pokemon_finetune")
    assert config.unet.pretrained == "stable-diffusion-v1-5/stable-diffusion-v1-5" and config.stages == ["diffusion"]
    assert config.diffusion.prediction_type == "epsilon" and config.diffusion.beta_schedule == "scaled_linear"
    scratch = composed("experiment=pokemon")
    assert (config.vae, config.text_encoder, config.data.path) == (
        scratch.vae, scratch.text_encoder, scratch.data.path
    )  # fmt: skip
    assert config.optim.lr < scratch.optim.lr / 5 and config.trainer.max_steps < scratch.trainer.max_steps / 5


@pytest.mark.parametrize(("unet", "width", "millions"), [("sd15", 768, 859.5), ("sd21", 1024, 865.9)])
def test_the_published_unets_have_their_published_size(unet, width, millions):
    config = composed("experiment=pokemon", f"unet={unet}", f"+unet.cross_attention_dim={width}")
    assert params(build_all(config)["unet"]) == pytest.approx(millions, abs=0.1)


def test_the_published_vae_has_its_published_size():
    config = composed("vae=kl_f8", "data.resolution=64")
    assert params(build_all(config)["vae"]) == pytest.approx(83.65, abs=0.1)


def test_unets_grow_from_tiny_to_base():
    sizes = [
        params(build_all(composed(f"unet={unet}", "data.resolution=256"))["unet"]) for unet in ("tiny", "small", "base")
    ]
    assert 0 < sizes[0] < sizes[1] / 3 < sizes[2] / 9


@pytest.mark.parametrize("trainer", options("trainer"))
@pytest.mark.parametrize("logger", options("logger"))
def test_trainers_loggers_and_callbacks_are_built(trainer, logger, tmp_path):
    (tmp_path / "shapes").mkdir()
    overrides = [f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.devices=1", f"logger={logger}"]
    if logger == "wandb":
        overrides += ["logger.wandb.offline=true", "logger.wandb.mode=disabled"]
        overrides[-1] = "+" + overrides[-1]
    config = tiny_config(tmp_path, *overrides)
    module = AutoencoderModule(networks.build_vae(config), config.autoencoder, config.seed)
    built = fit.build_trainer(config, module)
    assert {type(each).__name__ for each in built.loggers} >= {"MetricsCSV", "TensorBoardLogger"}
    assert ("WandbLogger" in {type(each).__name__ for each in built.loggers}) == (logger == "wandb")
    names = [type(each).__name__ for each in built.callbacks]
    assert names.count("Progress") == names.count("SampleGrid") == names.count("SaveCheckpoint") == 1
    assert built.max_steps == config.autoencoder.max_steps
    assert type(built.strategy).__name__ == ("SingleDeviceStrategy" if trainer in ("cpu", "gpu") else "DDP")


def test_every_file_stands_in_a_group_that_train_knows():
    groups = {folder.name for folder in cli.CONF_DIR.iterdir() if folder.is_dir()}
    others = {"experiment", "debug", "source", "perceptual", "discriminator", "recipe", "sweep"}
    assert groups == {case.split("=")[0] for case in CASES} | others


# --------------------------------------------------------------------------------- pretrained parts, in true format


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> dict[str, Path]:
    return write_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of captioned pictures as people have them: PNGs and a metadata.csv."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = ["file_name,text"]
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(root / f"{i:02d}.png")
        lines.append(f'{i:02d}.png,"a picture, number {i}"')
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def no_network(monkeypatch, hub):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, **_: str(hub[repo_id]))


def test_pokemon_trains_over_pretrained_parts(no_network, pictures, tmp_path, capsys):
    arguments = ["experiment=pokemon", f"output_dir={tmp_path}", f"data.path={pictures}", *SMALL]
    assert run_script("train", *arguments) == 0
    model = tmp_path / "pokemon" / "model"
    assert {path.name for path in model.iterdir() if path.is_dir()} == {
        "unet", "vae", "text_encoder", "tokenizer", "scheduler"
    }  # fmt: skip
    assert json.loads((model / "vae" / "config.json").read_text())["scaling_factor"] == 0.18215
    assert not (tmp_path / "stages").exists()
    capsys.readouterr()
    assert run_script("train", *arguments) == 0
    assert capsys.readouterr().out == f"diffusion    up to date: {model}\n"
    assert run_script("sample", f"ckpt={tmp_path / 'pokemon'}", "prompt=a fox", f"out={tmp_path / 'out'}") == 0

    # A model that was trained on other pictures than the built-in ones has no prompt accuracy.
    assert run_script("evaluate", f"ckpt={tmp_path / 'pokemon'}") == 2
    err = capsys.readouterr().err
    assert "prompt_accuracy reads pictures of the built-in shapes" in err and "data=hub" in err
    assert not list((tmp_path / "pokemon").glob("evaluation*"))


def test_a_unet_goes_on_from_a_pretrained_one(no_network, pictures, tmp_path):
    arguments = ["experiment=pokemon", f"output_dir={tmp_path}", f"data.path={pictures}", *SMALL]
    assert run_script("train", *arguments) == 0
    again = ["experiment=pokemon", f"output_dir={tmp_path}", f"data.path={pictures}"]
    again += [item for item in SMALL if "unet" not in item] + ["name=finetuned", "trainer.max_steps=1"]
    assert run_script("train", *again, f"+unet.pretrained={tmp_path / 'pokemon'}", "optim.lr=1e-9") == 0
    first, second = (weights.load_weights(tmp_path / name / "model" / "unet") for name in ("pokemon", "finetuned"))
    assert all(torch.allclose(first[key], second[key], atol=1e-5) for key in first)


def test_finetuning_goes_on_from_the_hubs_unet(no_network, hub, pictures, tmp_path):
    arguments = ["experiment=pokemon_finetune", f"output_dir={tmp_path}", f"data.path={pictures}", "optim.lr=1e-9"]
    arguments += [item for item in SMALL if "unet" not in item] + ["trainer.accumulate_grad_batches=1"]
    assert run_script("train", *arguments) == 0
    found = weights.load_weights(tmp_path / "pokemon_finetune" / "model" / "unet")
    started = weights.load_weights(hub["stable-diffusion-v1-5/stable-diffusion-v1-5"] / "unet")
    assert found.keys() == started.keys()
    assert all(torch.allclose(found[key], started[key], atol=1e-5) for key in found)
    assert run_script("sample", f"ckpt={tmp_path / 'pokemon_finetune'}", "prompt=a fox", f"out={tmp_path / 'o'}") == 0


def test_every_part_may_come_out_of_one_single_file(no_network, pictures, tmp_path):
    first = ["experiment=pokemon", f"output_dir={tmp_path}", f"data.path={pictures}"]
    assert run_script("train", *first, *SMALL) == 0
    file = tmp_path / "pokémon (1).safetensors"
    assert run_script("convert", f"src={tmp_path / 'pokemon'}", f"dst={file}") == 0
    parts = [f"vae.pretrained={file}", f"text_encoder.pretrained={file}", f"+unet.pretrained={file}"]
    again = [*first, *(item for item in SMALL if "unet" not in item), "name=again", "trainer.max_steps=1", *parts]
    assert run_script("train", *again, "optim.lr=1e-9") == 0
    for part in ("unet", "vae", "text_encoder"):
        one, other = (weights.load_weights(tmp_path / name / "model" / part) for name in ("pokemon", "again"))
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[key], other[key], atol=1e-5) for key in one)
    tokenizers = [
        json.loads((tmp_path / name / "model" / "tokenizer" / "tokenizer.json").read_text())["model"]
        for name in ("pokemon", "again")
    ]
    assert tokenizers[0] == tokenizers[1]


def test_a_unet_that_does_not_fit_the_loaded_parts(no_network, pictures, tmp_path, capsys):
    arguments = ["experiment=pokemon", f"output_dir={tmp_path}/out", f"data.path={pictures}", *SMALL]
    assert run_script("train", *arguments, "+unet.cross_attention_dim=17") == 2
    err = capsys.readouterr().err
    assert "unet.cross_attention_dim=17" in err and "16 wide" in err
    assert run_script("train", *arguments, "data.resolution=18") == 2
    assert "data.resolution=18 must be a multiple of 4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch, pictures, tmp_path, capsys):
    def unreachable(*args, **kwargs):
        raise OSError("no route to host\nand more")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    arguments = ["experiment=pokemon", f"output_dir={tmp_path}/out", f"data.path={pictures}", *SMALL]
    assert run_script("train", *arguments) == 2
    err = capsys.readouterr().err
    assert "stabilityai/sd-vae-ft-mse" in err and "vae.pretrained=./folder" in err and "no route to host" in err
    assert not (tmp_path / "out").exists()


def test_two_stages_before_a_pretrained_third_are_checked_first(tmp_path):
    config = tiny_config(tmp_path, "unet.attention_head_dim=3")
    with pytest.raises(UserError, match=r"unet: .*3 heads"):
        networks.check_networks(config, config.stages)
    networks.check_networks(config, ["autoencoder", "clip"])
    config = tiny_config(tmp_path, "text_encoder.vision.num_attention_heads=3")
    with pytest.raises(UserError, match="text_encoder: "):
        networks.check_networks(config, ["autoencoder", "clip"])
    networks.check_networks(config, ["autoencoder"])
