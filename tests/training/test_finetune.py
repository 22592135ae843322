"""Going on from a trained U-Net."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
from ldm.config import TrainConfig
from ldm.errors import UserError
from ldm.training import fit, stages
from ldm.training.finetune import check_prediction, train_only, widen
from ldm.training.networks import load_conditioner
from ldm.training.optim import parameter_groups
from ldm.weights.folder import load_weights
from ldm.weights.model import load_model, save_single_file
from runs import run_script, tiny_config


def trained(module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


# ------------------------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize(
    ("patterns", "belongs"),
    [
        (None, lambda name: True),
        (["*attn2*"], lambda name: "attn2" in name),
        (["mid_block"], lambda name: name.startswith("mid_block.")),
        (["conv_out.weight"], lambda name: name == "conv_out.weight"),
        (["*.to_?.weight", "conv_in"], lambda name: name.endswith(("to_q.weight", "to_k.weight", "to_v.weight")) or
         name.startswith("conv_in.")),
    ],
)  # fmt: skip
def test_patterns_name_what_is_trained(patterns, belongs):
    unet = tiny.unet()
    names = {name for name, _ in unet.named_parameters()}
    train_only(unet, patterns)
    assert trained(unet) == {name for name in names if belongs(name)} != set()
    given = {id(p) for group in parameter_groups(unet, 0.1) for p in group["params"]}
    assert given == {id(p) for name, p in unet.named_parameters() if belongs(name)}


@pytest.mark.parametrize(
    ("pattern", "says"),
    [("*atn2*", "did you mean 'attn2'"), ("midblock", "did you mean 'mid_block'"), ("zzz", "its parts are conv_in, ")],
)
def test_a_pattern_that_names_nothing_is_refused(pattern, says):
    with pytest.raises(UserError) as error:
        train_only(tiny.unet(), ["mid_block", pattern])
    assert repr(pattern) in str(error.value) and says in str(error.value)


@pytest.fixture(scope="module")
def tuned(finished) -> TrainConfig:
    overrides = [f"+unet.pretrained={finished.run_dir}", "+unet.train=[*attn2*]", "optim.lr=0.01", "name=tuned"]
    config = tiny_config(finished.output_dir, *overrides, "stages=[diffusion]", "+unet.gradient_checkpointing=true")
    stages.run(config)
    return config


def test_only_what_is_named_moves_and_has_a_state(finished, tuned):
    before, after = (load_weights(Path(config.run_dir) / "model" / "unet") for config in (finished, tuned))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("attn2" in name for name in moved)
    checkpoint = torch.load(fit.checkpoint_path(tuned, "diffusion"), weights_only=True)
    weights = checkpoint["state_dict"]
    names = [name for name in before if "attn2" in name]
    assert len(checkpoint["optimizer_states"][0]["state"]) == len(names)
    for name, tensor in before.items():
        assert ("attn2" in name) or torch.equal(weights[f"network.{name}"], tensor), name


def test_a_run_of_a_few_weights_goes_on(finished, tuned, tmp_path):
    """Interrupted and resumed it ends where it would have."""
    overrides = [f"+unet.pretrained={finished.run_dir}", "+unet.train=[*attn2*]", "optim.lr=0.01", "name=resumed"]
    overrides += ["stages=[diffusion]", "+unet.gradient_checkpointing=true", "optim.schedule=constant"]
    for steps in (2, 4):
        config = tiny_config(finished.output_dir, *overrides, f"trainer.max_steps={steps}")
        stages.run(config)
    once = tiny_config(finished.output_dir, *overrides, "trainer.max_steps=4", "name=at-once")
    stages.run(once)
    resumed, whole = (load_weights(Path(each.run_dir) / "model" / "unet") for each in (config, once))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_bad_patterns_are_told_before_anything_is_trained(finished, capsys):
    arguments = ["experiment=shapes", f"output_dir={finished.output_dir}", "name=bad", "stages=[diffusion]"]
    overrides = [f"+unet.pretrained={finished.run_dir}", "+unet.train=[*atn2*]", "data=shapes", "data.resolution=16"]
    config = tiny_config(finished.output_dir, *overrides, "name=bad", "stages=[diffusion]")
    with pytest.raises(UserError, match="attn2"):
        stages.run(config)
    assert not Path(config.run_dir).exists()
    assert run_script("train", *arguments, "+unet.train=[mid_block]") == 2
    assert "needs unet.pretrained" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- what it predicts


@pytest.mark.parametrize("kind", ["run", "folder", "file"])
def test_a_unet_that_predicts_something_else_is_refused(kind, tmp_path):
    model = tiny.write_model_folder(tmp_path / "run" / "model", "v_prediction")
    source = {"run": tmp_path / "run", "folder": model, "file": tmp_path / "model.safetensors"}[kind]
    if kind == "file":
        save_single_file(load_model(str(model)), source)
    check_prediction(str(source), "v_prediction")
    with pytest.raises(UserError, match=r"predicts v_prediction.*prediction_type=epsilon.*diffusion=v\b"):
        check_prediction(str(source), "epsilon")


def test_a_unet_alone_does_not_say_what_it_predicts(tmp_path):
    model = tiny.write_model_folder(tmp_path / "model", "v_prediction")
    for prediction_type in ("epsilon", "sample", "flow_prediction"):
        check_prediction(str(model / "unet"), prediction_type)


def test_a_flow_goes_on_as_a_flow(finished, capsys):
    config = tiny_config(finished.output_dir, "diffusion=flow", "name=flow", "stages=[diffusion]")
    stages.run(config)
    check_prediction(config.run_dir, "flow_prediction")
    with pytest.raises(UserError, match=r"predicts flow_prediction.*diffusion=flow"):
        check_prediction(config.run_dir, "epsilon")
    again = ["diffusion=ddpm", f"+unet.pretrained={config.run_dir}", "name=not-flow", "stages=[diffusion]"]
    with pytest.raises(UserError, match="predicts flow_prediction"):
        stages.run(tiny_config(finished.output_dir, *again))


def test_a_wider_unet_predicts_as_before():
    torch.manual_seed(0)
    unet = tiny.unet()
    x_t, more, t, context = (
        torch.randn(2, 4, 8, 8),
        torch.randn(2, 5, 8, 8),
        torch.tensor([1, 9]),
        torch.randn(2, 3, 16),
    )
    with torch.no_grad():
        before = unet(x_t, t, context)
        widen(unet, 9)
        torch.testing.assert_close(unet(torch.cat([x_t, more], 1), t, context), before)
    assert unet.config["in_channels"] == 9 and unet.sees_mask and unet.conv_in.weight.requires_grad
    unet(torch.cat([x_t, more], 1), t, context).sum().backward()
    assert unet.conv_in.weight.grad[:, 4:].abs().sum() > 0  # the new weights learn


def test_a_pretrained_text_encoder_with_another_s_tokenizer_is_told(tmp_path):
    folder = tiny.write_model_folder(tmp_path / "mismatched")
    tiny.train_tokenizer([f"word{chr(97 + i)}" * 3 for i in range(26)], 700, 12).save_pretrained(folder / "tokenizer")
    config: Any = SimpleNamespace(text_encoder=SimpleNamespace(pretrained=str(folder)))
    with pytest.raises(UserError, match=r"text_encoder\.pretrained=.*mismatched: the tokenizer has \d+ tokens"):
        load_conditioner(config)
