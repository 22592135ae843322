"""Damaged files, whatever the damage: a model, or a message for people; never another exception, never a hang."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from ldm.errors import UserError
from ldm.nn.autoencoder import AutoencoderKL
from ldm.nn.clip import CLIP, TextTower
from ldm.weights.archive import write_archive
from ldm.weights.folder import load_network, save_network
from ldm.weights.model import load_model, load_part, save_single_file
from ldm.weights.tensors import read_weights

VAE = {"block_out_channels": [4], "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"],
       "norm_num_groups": 2, "mid_block_add_attention": False}  # fmt: skip
UNET = {"block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 1}

# An edit: where, as a share of the file or of its header; how many bytes go; what comes in their place.
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, allow_nan=False), st.booleans(), st.integers(0, 40),
        st.binary(max_size=8) | st.sampled_from([b"9", b"-", b'"', b"}", b"[", b",", b"null", b"1e400", b"\xff"]),
    ),
    min_size=1,
    max_size=3,
)  # fmt: skip


def damaged(content: bytes, edits) -> bytes:
    """Edit the whole file, or the text of its header, whose length is then set right: its JSON is to be reached."""
    for place, in_header, gone, come in edits:
        end = 8 + int.from_bytes(content[:8], "little")
        if in_header and 8 < end <= len(content):
            at = 8 + int(place * (end - 8))
            header = content[8:at] + come + content[min(at + gone, end) : end]
            content = len(header).to_bytes(8, "little") + header + content[end:]
        else:
            at = int(place * len(content))
            content = content[:at] + come + content[at + gone :]
    return content


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("damage")
    vae = tiny.vae(**VAE)
    write_archive(place / "vae.safetensors", {"vae": vae})
    torch.save(vae.state_dict(), place / "vae.ckpt")
    save_network(vae, place / "vae")
    folder = tiny.write_model_folder(place / "model", **UNET)
    save_network(vae, folder / "vae")
    save_single_file(load_model(str(folder)), place / "model.safetensors")
    return {name: place / name for name in ("vae.safetensors", "vae.ckpt", "model.safetensors", "vae")}


def survives(load, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        load(str(path))
    except UserError as error:
        assert str(error)


@settings(max_examples=150, deadline=None)
@given(edits=EDITS)
def test_a_damaged_network(files, edits):
    content = files["vae.safetensors"].read_bytes()
    path = files["vae"].parent / "damaged.safetensors"
    survives(lambda source: load_part(AutoencoderKL, source), path, damaged(content, edits))
    survives(lambda source: read_weights(Path(source), torch.bfloat16), path, damaged(content, edits))


@settings(max_examples=60, deadline=None)
@given(edits=EDITS)
def test_a_damaged_pickle(files, edits):
    content = files["vae.ckpt"].read_bytes()
    survives(lambda source: load_part(AutoencoderKL, source), files["vae"].parent / "damaged.ckpt",
             damaged(content, [(place, False, gone, come) for place, _, gone, come in edits]))  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(edits=EDITS)
def test_a_damaged_model(files, edits):
    content = files["model.safetensors"].read_bytes()
    survives(load_model, files["vae"].parent / "damaged model.safetensors", damaged(content, edits))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_config_of_anything(files, data):
    """Values of any kind in the place of a config's, few or many."""
    folder = files["vae"]
    original = (folder / "config.json").read_text()
    config = json.loads(original)
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    value = leaf | st.lists(leaf, max_size=3) | st.dictionaries(st.text(max_size=3), leaf, max_size=2)
    for name in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2)):
        config[name] = data.draw(value)
    try:
        (folder / "config.json").write_text(json.dumps(config))
        load_network(AutoencoderKL, folder)
    except UserError as error:
        assert str(error)
    finally:
        (folder / "config.json").write_text(original)


@pytest.mark.parametrize("change", [{"num_hidden_layers": 10**9}, {"num_hidden_layers": [10**9]}])
def test_a_config_of_endless_layers(tmp_path, change):
    for network, model in ((TextTower, tiny.text_tower()), (CLIP, tiny.clip())):
        folder = tmp_path / network.__name__
        save_network(model, folder)
        config = json.loads((folder / "config.json").read_text())
        (config["text_config"] if network is CLIP else config).update(change)
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"config.json asks for more layers than .* has tensors"):
            load_network(network, folder)


@pytest.mark.parametrize(("network", "change"), [
    (TextTower, {"eos_token_id": True}), (TextTower, {"eos_token_id": "2"}), (TextTower, {"layer_norm_eps": 1e400}),
    (AutoencoderKL, {"scaling_factor": {"_target_": "os.system"}}), (AutoencoderKL, {"shift_factor": "0"}),
    (AutoencoderKL, {"latent_channels": 2**40}), (AutoencoderKL, {"sample_size": [8, None]}),
    (AutoencoderKL, {"scaling_factor": float("nan")}), (AutoencoderKL, {"use_quant_conv": 1}),
])  # fmt: skip
def test_an_option_of_another_kind_is_named_when_it_is_loaded(tmp_path, network, change):
    """Some are used in drawing alone, where they would fail far from the file."""
    save_network(tiny.text_tower() if network is TextTower else tiny.vae(), tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=rf"config\.json: .*option {next(iter(change))}=.* is not supported \(only "):
        load_network(network, tmp_path / "x")
