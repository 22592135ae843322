import json

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from ldm.nn.clip import CLIP, TextTower, VisionTower
from nn.configs import SD15_TEXT

EOS = 49
TEXT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": EOS,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_channels": 3,
    "image_size": 16,
    "patch_size": 4,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
BOOKKEEPING = {"bos_token_id": 48, "pad_token_id": 0}


def ids(length: int = 9) -> torch.Tensor:
    """Token ids of three texts of different lengths, padded with more ends of text, as for Stable Diffusion 1.x."""
    input_ids = torch.randint(0, EOS, (3, length))
    for row, end in enumerate((2, length // 2, length - 1)):
        input_ids[row, end:] = EOS
    return input_ids


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos_token_id", [EOS, 2])
def test_parity_with_transformers(scramble, anatomy, hidden_act, eos_token_id):
    config = {
        "text_config": {**TEXT, "hidden_act": hidden_act, "eos_token_id": eos_token_id, **BOOKKEEPING},
        "vision_config": {**VISION, "hidden_act": hidden_act},
        "projection_dim": 20,
    }
    theirs = scramble(CLIPModel(CLIPConfig(**config)))
    ours = CLIP.from_config(theirs.config.to_dict()).eval()
    assert anatomy(ours) == anatomy(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    input_ids, image = ids(), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        expected = theirs(input_ids=input_ids, pixel_values=image)
        their_text, their_image = theirs.text_model(input_ids), theirs.vision_model(image)
        text_states, text_pooled = ours.text_model(input_ids)
        image_states, image_pooled = ours.vision_model(image)
        for mine, other in (
            (text_states, their_text.last_hidden_state),
            (text_pooled, their_text.pooler_output),
            (image_states, their_image.last_hidden_state),
            (image_pooled, their_image.pooler_output),
            (ours.encode_text(input_ids), theirs.text_projection(their_text.pooler_output)),
            (ours.encode_image(image), theirs.visual_projection(their_image.pooler_output)),
            (ours(input_ids, image), expected.logits_per_image),
        ):
            torch.testing.assert_close(mine, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize("skip_last", [0, 1, 2])
def test_clip_skip_agrees_with_transformers_hidden_states(scramble, skip_last):
    theirs = scramble(CLIPTextModel(CLIPTextConfig(**TEXT, **BOOKKEEPING)))
    ours = TextTower(**TEXT).eval()
    ours.load_state_dict({k.removeprefix("text_model."): v for k, v in theirs.state_dict().items()}, strict=True)
    input_ids = ids()
    with torch.no_grad():
        hidden = theirs(input_ids, output_hidden_states=True).hidden_states[-(skip_last + 1)]
        expected = ours.final_layer_norm(hidden)
        states, pooled = ours(input_ids, skip_last=skip_last)
    torch.testing.assert_close(states, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(pooled, expected[torch.arange(3), [2, 4, 8]], atol=1e-4, rtol=0)


def test_vision_tower_alone_agrees_with_transformers(scramble):
    theirs = scramble(CLIPVisionModel(CLIPVisionConfig(**VISION)))
    ours = VisionTower(**VISION).eval()
    ours.load_state_dict({k.removeprefix("vision_model."): v for k, v in theirs.state_dict().items()}, strict=True)
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(image)[1], theirs(image).pooler_output, atol=1e-4, rtol=0)


def test_states_do_not_depend_on_later_tokens():
    tower = TextTower(**TEXT)
    input_ids = ids()
    changed = input_ids.clone()
    changed[:, 5:] = 7
    torch.testing.assert_close(tower(input_ids)[0][:, :5], tower(changed)[0][:, :5])
    assert not torch.allclose(tower(input_ids)[0][:, 5], tower(changed)[0][:, 5])


def test_published_text_tower_has_its_names_shapes_norms_and_size(anatomy):
    with torch.device("meta"):
        ours, theirs = TextTower.from_config(SD15_TEXT), CLIPTextModel(CLIPTextConfig(**SD15_TEXT))
    theirs = getattr(theirs, "text_model", theirs)  # transformers 4.x has the tower one level down
    assert anatomy(ours) == anatomy(theirs)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 123_060_480
    assert ours.config["eos_token_id"] == 2


@pytest.mark.parametrize("cls", [CLIPConfig, CLIPTextConfig, CLIPVisionConfig])
@pytest.mark.parametrize("full", [False, True])
def test_what_transformers_saves_can_be_read(tmp_path, cls, full):
    config = cls()
    if full:
        written = json.loads(json.dumps(config.to_dict(), default=str))
    else:
        config.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
    network = {CLIPConfig: CLIP, CLIPTextConfig: TextTower, CLIPVisionConfig: VisionTower}[cls]
    with torch.device("meta"):
        assert network.from_config(written).config == network().config


def test_older_files_give_the_options_twice():
    twice = {"text_config": TEXT, "text_config_dict": {"num_hidden_layers": 1}, "vision_config": VISION}
    assert CLIP.from_config({**twice, "vision_config_dict": None}).config["text_config"]["num_hidden_layers"] == 1


def test_config_builds_the_same_network_again_here_and_in_transformers():
    clip = CLIP(text_config=TEXT, vision_config=VISION, projection_dim=20, logit_scale_init_value=1.5)
    config = json.loads(json.dumps(clip.config))
    assert CLIP(**config).config == clip.config == config
    assert config == {
        "text_config": TEXT,
        "vision_config": VISION,
        "projection_dim": 20,
        "logit_scale_init_value": 1.5,
    }
    theirs = CLIPModel(CLIPConfig(**{**config, "text_config": {**TEXT, **BOOKKEEPING}}))
    theirs.load_state_dict(clip.state_dict(), strict=True)
    assert clip.logit_scale.item() == 1.5


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        (TextTower, {"attention_dropout": 0.1}, "TextTower: option attention_dropout=0.1 .* is not supported"),
        (TextTower, {"hidden_act": "relu"}, "TextTower: option hidden_act='relu' is not supported"),
        (TextTower, {"num_layers": 3}, "TextTower: option num_layers=3 in config.json is not known"),
        (TextTower, {"num_attention_heads": 5}, "num_attention_heads=5 does not divide hidden_size=32"),
        (VisionTower, {"hidden_act": "relu"}, "VisionTower: option hidden_act='relu' is not supported"),
        (VisionTower, {"image_sise": 3}, "VisionTower: option image_sise=3 in config.json is not known"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(network, changes, message):
    config = {**(TEXT if network is TextTower else VISION), **changes}
    with pytest.raises(ValueError, match=message):
        network.from_config(config)
    with pytest.raises(ValueError, match=message):
        CLIP.from_config(
            {"text_config": TEXT, "vision_config": VISION, f"{network.__name__[:-5].lower()}_config": config}
        )


def test_wrong_inputs_are_refused():
    clip = CLIP(text_config=TEXT, vision_config=VISION)
    with pytest.raises(ValueError, match="13 tokens, but max_position_embeddings=12"):
        clip.encode_text(ids(13))
    with pytest.raises(ValueError, match="images are 16x20, but image_size=16"):
        clip.encode_image(torch.zeros(1, 3, 16, 20))
    for skip_last in (-1, 3):
        with pytest.raises(ValueError, match=rf"skip_last={skip_last} must be in \[0, 3\)"):
            clip.text_model(ids(), skip_last=skip_last)


def test_initial_weights_have_the_scales_of_the_paper_but_for_embeddings():
    torch.manual_seed(0)
    clip = CLIP(text_config={**TEXT, "hidden_size": 128, "intermediate_size": 512}, vision_config=VISION)
    layer = clip.text_model.encoder.layers[0]
    for weight, std in (
        (layer.self_attn.q_proj.weight, 128**-0.5),
        (layer.self_attn.out_proj.weight, 128**-0.5 * 6**-0.5),
        (layer.mlp.fc1.weight, 256**-0.5),
        (layer.mlp.fc2.weight, 128**-0.5 * 6**-0.5),
        (clip.text_model.embeddings.token_embedding.weight, 1.0),
        (clip.text_model.embeddings.position_embedding.weight, 0.5),
        (clip.text_projection.weight, 128**-0.5),
        (clip.visual_projection.weight, 24**-0.5),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert not layer.mlp.fc1.bias.any()


def test_a_few_steps_teach_pairs():
    torch.manual_seed(0)
    clip = CLIP(text_config=TEXT, vision_config=VISION, projection_dim=16)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=3e-3)
    input_ids, image, pairs = ids(), torch.randn(3, 3, 16, 16), torch.arange(3)
    for _ in range(20):
        logits = clip(input_ids, image)
        loss = torch.nn.functional.cross_entropy(logits, pairs) + torch.nn.functional.cross_entropy(logits.T, pairs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in clip.parameters())
    assert logits.argmax(1).equal(pairs) and logits.argmax(0).equal(pairs)
