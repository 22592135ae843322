"""`convert.py` as a user types it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.unet import UNet
from ldm.weights.folder import save_network
from ldm.weights.model import load_model, load_part
from runs import ROOT, run_script


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A run directory with its model. Read it, do not write into it."""
    run = tmp_path_factory.mktemp("run")
    tiny.write_model_folder(run / "model", prediction_type="v_prediction")
    return run


def states(source: Path) -> dict[str, torch.Tensor]:
    loaded = load_model(str(source), None)
    networks = {"unet": loaded.unet, "vae": loaded.vae, "text": loaded.text_tower}
    return {f"{part}.{name}": t for part, network in networks.items() for name, t in network.state_dict().items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_there_and_back(model, tmp_path, capsys):
    assert run_script("convert", f"src={model}", f"dst={tmp_path / 'one.safetensors'}") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"read     {model}: unet 0.2006 M, vae 0.04371 M, text_encoder 0.01363 M parameters")
    assert out[0].endswith("; predicts v_prediction")
    assert out[1].startswith(f"written  {tmp_path / 'one.safetensors'}: single file, float32, 1.1 MB")
    assert run_script("convert", f"src={tmp_path / 'one.safetensors'}", f"dst={tmp_path / 'folder'}") == 0
    assert "folder: diffusers folder, float32, 1.1 MB" in capsys.readouterr().out
    assert_equal(states(tmp_path / "folder"), states(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "one.safetensors"]
    diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "folder")


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_dtypes(model, tmp_path, name, dtype, capsys):
    for dst in ("half", "half.safetensors"):
        assert run_script("convert", f"src={model}", f"dst={tmp_path / dst}", f"dtype={name}") == 0
        assert f"{dtype}".removeprefix("torch.") in capsys.readouterr().out
        assert_equal(states(tmp_path / dst), {key: tensor.to(dtype) for key, tensor in states(model).items()})
    for dst in ("kept", "kept.safetensors"):
        assert run_script("convert", f"src={tmp_path / 'half'}", f"dst={tmp_path / dst}") == 0
        assert_equal(states(tmp_path / dst), states(tmp_path / "half"))
    assert run_script("convert", f"src={tmp_path / 'half'}", f"dst={tmp_path / 'full'}", "dtype=fp32") == 0
    assert {tensor.dtype for tensor in states(tmp_path / "full").values()} == {torch.float32}


def test_parts_are_mixed(model, tmp_path):
    vae = tiny.vae(seed=9)
    save_network(vae, tmp_path / "vae, other (é)")
    arguments = [f"src={model}", f"dst={tmp_path / 'mixed.safetensors'}", f"vae={tmp_path / 'vae, other (é)'}"]
    assert run_script("convert", *arguments, "prediction_type=epsilon") == 0
    mixed = load_model(str(tmp_path / "mixed.safetensors"))
    assert_equal(mixed.vae.state_dict(), vae.state_dict())
    assert mixed.scheduler["prediction_type"] == "epsilon"


def test_a_vae_by_itself(model, tmp_path, capsys):
    vae = load_part(AutoencoderKL, str(model)).state_dict()
    source = model / "model" / "vae"
    assert run_script("convert", f"src={source}", f"dst={tmp_path / 'vae.safetensors'}") == 0
    assert f"read     {source}: vae 0.04371 M parameters\n" in capsys.readouterr().out
    assert "encoder.down.0.block.0.conv1.weight" in load_file(
        tmp_path / "vae.safetensors"
    )  # as published: without prefix
    theirs = diffusers.AutoencoderKL.from_single_file(
        str(tmp_path / "vae.safetensors"), config=str(source), local_files_only=True
    )
    assert_equal(theirs.state_dict(), vae)
    for src, dst in (("vae.safetensors", "folder"), ("folder", "again.safetensors")):
        assert run_script("convert", f"src={tmp_path / src}", f"dst={tmp_path / dst}") == 0
        assert_equal(load_part(AutoencoderKL, str(tmp_path / dst)).state_dict(), vae)
    assert (tmp_path / "vae.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    diffusers.AutoencoderKL.from_pretrained(tmp_path / "folder")


def test_a_unet_by_itself(model, tmp_path):
    unet = load_part(UNet, str(model)).state_dict()
    for src, dst in ((model / "model" / "unet", "unet.safetensors"), (tmp_path / "unet.safetensors", "unet")):
        assert run_script("convert", f"src={src}", f"dst={tmp_path / dst}", "dtype=bf16") == 0
        found = load_part(UNet, str(tmp_path / dst), None).state_dict()
        assert_equal(found, {name: tensor.bfloat16() for name, tensor in unet.items()})


def test_an_old_checkpoint_becomes_safetensors(tmp_path):
    """A file of another tool, which says nothing of heads and groups."""
    vae = tiny.vae(block_out_channels=[32, 64], norm_num_groups=32)
    save_network(vae, tmp_path / "folder")
    assert run_script("convert", f"src={tmp_path / 'folder'}", f"dst={tmp_path / 'x.safetensors'}") == 0
    torch.save({"state_dict": load_file(tmp_path / "x.safetensors"), "epoch": 3}, tmp_path / "x.ckpt")
    assert run_script("convert", f"src={tmp_path / 'x.ckpt'}", f"dst={tmp_path / 'y.safetensors'}") == 0
    assert_equal(load_part(AutoencoderKL, str(tmp_path / "y.safetensors")).state_dict(), vae.state_dict())


def test_dst_is_replaced_only_where_that_is_said(model, tmp_path, capsys):
    for dst in (tmp_path / "one.safetensors", tmp_path / "folder"):
        assert run_script("convert", f"src={model}", f"dst={dst}") == 0
        assert run_script("convert", f"src={model}", f"dst={dst}", "dtype=fp16") == 2
        assert f"dst={dst} is there already; overwrite=true replaces it" in capsys.readouterr().err
        assert {tensor.dtype for tensor in states(dst).values()} == {torch.float32}
        assert run_script("convert", f"src={model}", f"dst={dst}", "dtype=fp16", "overwrite=true") == 0
        assert {tensor.dtype for tensor in states(dst).values()} == {torch.float16}


def test_what_is_read_is_never_replaced(model, tmp_path, capsys):
    shutil.copytree(model / "model", tmp_path / "model")
    assert run_script("convert", f"src={model}", f"dst={tmp_path / 'one.safetensors'}") == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for src, dst in (("model", "model"), ("model/vae", "model"), ("one.safetensors", "one.safetensors")):
        assert run_script("convert", f"src={tmp_path / src}", f"dst={tmp_path / dst}", "overwrite=true") == 2
        assert f"dst={tmp_path / dst} holds src={tmp_path / src}: write elsewhere" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_model_and_a_network_do_not_replace_one_another(model, tmp_path, capsys):
    shutil.copytree(model / "model", tmp_path / "model")
    shutil.copytree(model / "model" / "vae", tmp_path / "vae")
    for src, dst, holds in ((model / "model" / "vae", "model", "a whole model"), (model, "vae", "a single network")):
        assert run_script("convert", f"src={src}", f"dst={tmp_path / dst}", "overwrite=true") == 2
        assert f"dst={tmp_path / dst} holds {holds}: write elsewhere" in capsys.readouterr().err
    assert (tmp_path / "model" / "unet").is_dir() and not (tmp_path / "vae" / "unet").exists()


def test_a_folder_of_something_else_is_never_replaced(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    monkeypatch.chdir(tmp_path / "home")
    for dst in (".", str(tmp_path / "home"), str(tmp_path)):
        assert run_script("convert", f"src={model}", f"dst={dst}", "overwrite=true") == 2
        assert "holds something else than a model" in capsys.readouterr().err
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    assert run_script("convert", f"src={model}", f"dst={tmp_path / 'empty'}", "overwrite=true") == 0


BAD = [
    (["dst={tmp}/x"], "'src' is missing"),
    (["src={run}"], "'dst' is missing"),
    (["src={run}", "dst="], "dst"),
    (["src={tmp}/nowhere", "dst={tmp}/x"], "src={tmp}/nowhere: there is no such folder or file"),
    (["src={tmp}", "dst={tmp}/x"], "src={tmp} is neither a run directory nor a model folder"),
    (["src={run}/model/text_encoder", "dst={tmp}/x"], "is a clip_text_model; whole models are converted"),
    (["src={tmp}/tower.safetensors", "dst={tmp}/x"], "is a text_encoder; whole models are converted"),
    (["src={tmp}/lora.safetensors", "dst={tmp}/x"], "a LoRA"),
    (["src={tmp}/text.safetensors", "dst={tmp}/x"], "cannot be read, it may be cut short"),
    (["src={run}", "dst={tmp}/x", "format=single_file"], "must end in .safetensors"),
    (["src={run}", "dst={tmp}/x.safetensors", "format=diffusers"], "has the name of a file"),
    (["src={run}", "dst={tmp}/x", "format=ckpt"], "'single_file'"),
    (["src={run}", "dst={tmp}/x", "dtype=int8"], "dtype"),
    (["src={run}", "dst={tmp}/x", "dytpe=fp16"], "did you mean 'dtype'?"),
    (["src={run}", "dst={tmp}/x", "prediction_type=eps"], "prediction_type"),
    (["src={run}", "dst={tmp}/x", "vae={tmp}/nowhere"], "vae={tmp}/nowhere: there is no such folder or file"),
    (["src={run}", "dst={tmp}/x", "vae={run}/model/unet"], "a vae must be a AutoencoderKL"),
    (["src={run}", "dst={tmp}/x", "unet={tmp}/lora.safetensors"], "a LoRA"),
    (["src={run}", "dst={tmp}/text.safetensors/x"], "text.safetensors is a file"),
    (["src={run}", "dst={tmp}/text.safetensors"], "is there already"),
    (["src={run}", "dst={tmp}/text", "overwrite=true"], "is a file; to write a folder"),
    (["src={run}", "dst={tmp}/folder.safetensors", "overwrite=true"], "is a folder"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_told_in_one_message_and_leaves_nothing(model, tmp_path, arguments, message, capsys):
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    (tmp_path / "text.safetensors").write_text("hello, this is no tensor, and is long enough")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "folder.safetensors").mkdir()
    shutil.copy(model / "model" / "text_encoder" / "model.safetensors", tmp_path / "tower.safetensors")
    shutil.copy(model / "model" / "text_encoder" / "config.json", tmp_path / "config.json")
    if "src={tmp}" in arguments:
        (tmp_path / "config.json").unlink()
    before = sorted(path.name for path in tmp_path.iterdir())
    assert run_script("convert", *(word.format(run=model, tmp=tmp_path) for word in arguments)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message.format(run=model, tmp=tmp_path) in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_full_disk_is_told(model, tmp_path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    for dst in ("new", "new.safetensors"):
        assert run_script("convert", f"src={model}", f"dst={tmp_path / dst}") == 2
        assert f"error: {tmp_path / dst} cannot be written: No space left on device\n" == capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def type_it(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    command = [sys.executable, str(ROOT / "convert.py"), *words]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("words", [["--help"], ["src=nowhere", "dst=x"], ["src=a", "dst=x.safetensors", "format=x"]])
def test_what_needs_no_torch_does_without(words, tmp_path):
    done = type_it(*words, cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == (0 if words == ["--help"] else 2)
    assert not any(line.rpartition("|")[2].strip() == "torch" for line in done.stderr.splitlines())
    assert not list(tmp_path.iterdir())


def test_the_help_lists_every_key_and_relative_paths_work(model, tmp_path):
    done = type_it("--help", cwd=tmp_path)
    for key in ("src", "dst", "format", "dtype", "vae", "text_encoder", "unet", "tokenizer", "ema", "overwrite"):
        assert f"\n  {key}: " in done.stdout
    shutil.copytree(model / "model", tmp_path / "model")
    done = type_it("src=model", "dst=out/of/here.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "written  out/of/here.safetensors: single file" in done.stdout
    assert_equal(states(tmp_path / "out" / "of" / "here.safetensors"), states(model))


def test_a_hub_id_without_a_network(tmp_path):
    done = type_it("src=stabilityai/sd-vae-ft-mse", "dst=vae.safetensors", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: src=stabilityai/sd-vae-ft-mse is no local folder and cannot be had from the hub" in done.stderr
    assert "src=./folder" in done.stderr and not list(tmp_path.iterdir())
