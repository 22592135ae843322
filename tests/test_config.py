import copy
import math
from typing import Any, get_args

import pytest
import yaml

from ldm.config import (
    SCHEMAS,
    EvaluateConfig,
    SampleConfig,
    Sampler,
    TrainConfig,
    check,
    known_keys,
    load_run_config,
)
from ldm.errors import UserError
from runs import TINY, compose_values, tiny_config


@pytest.fixture(scope="module")
def composed() -> dict[str, Any]:
    return compose_values("train", TINY)


def changed(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return a copy in which one dotted key holds another value."""
    values = copy.deepcopy(values)
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return values


def complaint(schema, values) -> str:
    with pytest.raises(UserError) as error:
        check(schema, values)
    return str(error.value)


# ------------------------------------------------------------------------------------------------ keys and values


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sede", "seed"),
        ("optim.lrr", "optim.lr"),
        ("clip.optim.wramup_steps", "clip.optim.warmup_steps"),
        ("autoencoder.max_step", "autoencoder.max_steps"),
        ("unet.block_out_chanels", "unet.block_out_channels"),
        ("text_encoder.vision.patchsize", "text_encoder.vision.patch_size"),
        ("data.resolutoin", "data.resolution"),
        ("max_steps", "trainer.max_steps"),
        ("optim._target", "optim._target_"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_real_one(composed, key, nearest):
    message = complaint(TrainConfig, changed(composed, key, 3))
    assert f"unknown config key '{key}'" in message
    assert message.count(f"'{nearest}'") == 1 or key == "max_steps"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("optim.lr", 0, "optim.lr: Input should be greater than 0, not 0"),
        ("optim.lr", math.inf, "finite"),
        ("optim.lr", math.nan, "optim.lr"),
        ("optim.lr", "fast", "'fast'"),
        ("optim.weight_decay", -0.1, "-0.1"),
        ("optim.weight_decay", math.inf, "finite"),
        ("optim.schedule", "cosin", "'cosin'"),
        ("optim.clip_norm", 0, "optim.clip_norm"),
        ("seed", -1, "seed"),
        ("seed", 2**63, "seed"),
        ("seed", 1.5, "1.5"),
        ("name", "", "name"),
        ("name", "a/b", "'a/b'"),
        ("name", "..", "'..'"),
        ("name", "stages", "'stages'"),
        ("name", "cache", "'cache'"),
        ("name", "a\udcff", "name"),
        ("output_dir", "", "output_dir"),
        ("run_dir", "", "run_dir"),
        ("stages", [], "stages"),
        ("stages", ["vae"], "'vae'"),
        ("stages", "diffusion", "stages"),
        ("stages", ["clip", "clip"], "twice"),
        ("resume", "maybe", "'maybe'"),
        ("data.kind", "foo", "data.kind must be one of shapes, hub, folder"),
        ("data.buckets", "maybe", "data.buckets"),
        ("data.crop", "left", "'left'"),
        ("data.max_bad", 2, "data.max_bad"),
        ("data.cache_dtype", "int8", "'int8'"),
        ("data.background", [0, 0, 256], "256"),
        ("data.background", [0, 0], "data.background"),
        ("data.variants", 1, "data.variants"),
        ("vae.in_channels", 2, "vae.in_channels"),
        ("data.objects", 3, "data.objects"),
        ("data.num_val", 0, "data.num_val"),
        ("data.batch_size", 0, "data.batch_size"),
        ("data.num_workers", -1, "data.num_workers"),
        ("data.cache", "perhaps", "data.cache"),
        ("data", 3, "data.kind"),
        ("vae.block_out_channels", [], "vae.block_out_channels"),
        ("vae.block_out_channels", 8, "vae.block_out_channels"),
        ("vae.block_out_channels", [8, -8], "-8"),
        ("unet.down_block_types", ["Block"], "'Block'"),
        ("unet.dropout", 1.5, "1.5"),
        ("text_encoder.vocab_size", 514, "514"),
        ("text_encoder.max_length", 3, "text_encoder.max_length"),
        ("clip.batch_size", 1, "clip.batch_size"),
        ("diffusion.caption_dropout", 1.01, "diffusion.caption_dropout"),
        ("diffusion.ema_decay", 1.0, "diffusion.ema_decay"),
        ("diffusion.prediction_type", "eps", "'eps'"),
        ("diffusion.beta_end", 1.0, "diffusion.beta_end"),
        ("diffusion.beta_start", 0.5, "above"),
        ("diffusion.num_train_timesteps", 1, "diffusion.num_train_timesteps"),
        ("trainer.precision", "fp32", "'fp32'"),
        ("trainer.precision", "16-mixed", "trainer.precision=32-true"),
        ("trainer.max_steps", 0, "trainer.max_steps"),
        ("trainer.overfit_batches", -1, "trainer.overfit_batches"),
        ("sampling.steps", 0, "sampling.steps"),
        ("sampling.steps", 1001, "diffusion.num_train_timesteps=1000"),
        ("sampling.sampler", "eulr", "'euler'"),
        ("sampling.guidance_scale", -1, "sampling.guidance_scale"),
        ("logger", {"csv": {"folder": "x"}}, "logger.csv._target_"),
        ("logger", {"csv": 3}, "logger.csv"),
    ],
)
def test_a_bad_value_is_named_with_its_key(composed, key, value, says):
    message = complaint(TrainConfig, changed(composed, key, value))
    assert says in message
    assert "\n" not in message or "faults" in message


def test_a_value_of_several_types_has_one_line(composed):
    assert complaint(TrainConfig, changed(composed, "trainer.devices", 0)) == (
        "trainer.devices: Input should be greater than 0, or Input should be 'auto', not 0"
    )
    message = complaint(TrainConfig, changed(composed, "unet.attention_head_dim", "many"))
    assert message.startswith("unet.attention_head_dim: ") and message.endswith("not 'many'") and "\n" not in message


def test_all_faults_are_told_at_once(composed):
    values = changed(changed(changed(composed, "optim.lr", -1), "unet.heads", 3), "seed", "x")
    lines = complaint(TrainConfig, values).split("\n  ")
    assert lines[0] == "the config has faults:" and len(lines) == 4
    assert all(any(key in line for line in lines) for key in ("optim.lr", "unet.heads", "seed"))


@pytest.mark.parametrize("key", ["data.resolution", "optim", "optim.lr", "trainer.max_steps", "sampling", "logger"])
def test_a_missing_key_is_named(composed, key):
    values = copy.deepcopy(composed)
    node = values
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    del node[last]
    assert f"'{key}' is missing" in complaint(TrainConfig, values)


@pytest.mark.parametrize("value", [None, ""])
def test_a_path_that_must_be_given(value):
    values = changed(compose_values("train", ["data=hub"]), "data.path", value)
    assert "data.path" in complaint(TrainConfig, values)
    values = changed(compose_values("sample", ["prompt=x"]), "ckpt", value)
    assert "ckpt" in complaint(SampleConfig, values)


def test_yaml_leaves_out_what_must_be_given():
    assert complaint(TrainConfig, compose_values("train", ["data=hub"])).endswith("give it as data.path=…")
    assert complaint(SampleConfig, compose_values("sample", ["prompt=x"])).endswith("give it as ckpt=…")
    assert complaint(EvaluateConfig, compose_values("evaluate")).endswith("give it as ckpt=…")


def test_numbers_typed_in_other_ways(composed):
    for key, value, read in (("trainer.max_steps", 1e3, 1000), ("optim.lr", "1e-3", 1e-3), ("seed", 0, 0)):
        node: Any = check(TrainConfig, changed(composed, key, value))
        for part in key.split("."):
            node = getattr(node, part)
        assert node == read


# ------------------------------------------------------------------------------------------------- combinations


@pytest.mark.parametrize(
    ("resolution", "says"), [(17, "16 or 20"), (18, "16 or 20"), (3, "such as 4"), (30, "28 or 32")]
)
def test_a_size_that_cannot_be_halved(composed, resolution, says):
    """The tiny VAE halves once, its U-Net once more."""
    message = complaint(TrainConfig, changed(composed, "data.resolution", resolution))
    assert f"data.resolution={resolution}" in message and "multiple of 4" in message and says in message


def test_a_size_that_the_vision_tower_cannot_cut(composed):
    assert "patch_size=8" in complaint(TrainConfig, changed(composed, "data.resolution", 20))


def test_text_and_unet_of_other_widths(composed):
    message = complaint(TrainConfig, changed(composed, "unet.cross_attention_dim", 17))
    assert "unet.cross_attention_dim=17" in message and "hidden_size=16" in message
    assert check(TrainConfig, changed(composed, "unet.cross_attention_dim", 16))


def test_a_stage_whose_result_is_loaded(composed):
    message = complaint(TrainConfig, changed(composed, "text_encoder.pretrained", "some/where"))
    assert "'clip'" in message and "text_encoder.pretrained=some/where" in message
    values = changed(composed, "text_encoder.pretrained", "some/where")
    values["stages"].remove("clip")
    check(TrainConfig, values)


def test_a_pretrained_vae_is_taken_as_it_is_or_gone_on_from(composed):
    values = changed(composed, "vae.pretrained", "some/where")
    assert check(TrainConfig, values).frozen_vae is None
    values["stages"].remove("autoencoder")
    assert check(TrainConfig, values).frozen_vae == "some/where"


@pytest.mark.parametrize(("prompt", "file"), [(None, None), ("a", "b")])
def test_prompts_come_from_one_place(prompt, file):
    values = {**compose_values("sample", ["ckpt=x"]), "prompt": prompt, "prompt_file": file}
    assert "either prompt=" in complaint(SampleConfig, values)


def test_an_empty_prompt_is_a_prompt():
    assert check(SampleConfig, compose_values("sample", ["ckpt=x", "prompt="])).prompt == ""


# --------------------------------------------------------------------------------------------------- the rest of it


def test_the_config_cannot_be_changed_later(composed):
    config = check(TrainConfig, composed)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 3


def test_the_samplers_that_may_be_named_are_those_there_are():
    from ldm.diffusion.samplers import SAMPLERS

    assert set(get_args(Sampler)) == set(SAMPLERS)


def test_known_keys_are_dotted_and_real(composed):
    keys = known_keys("train")
    assert {"seed", "optim.lr", "optim._target_", "autoencoder.optim.lr", "unet.dropout", "data.path"} <= set(keys)
    assert "optim.target" not in keys and "logger._target_" not in keys

    def walk(values, prefix=""):
        for key, value in values.items():
            yield prefix + key
            if isinstance(value, dict) and prefix + key not in ("logger", "callbacks", "optim.arguments"):
                yield from walk(value, f"{prefix}{key}.")

    free = tuple(f"{optim}.arguments." for optim in ("optim", "clip.optim", "autoencoder.optim"))
    assert {key for key in walk(composed) if not key.startswith(free)} <= set(keys)


def test_options_are_those_that_are_stated(tmp_path):
    config = tiny_config(tmp_path)
    assert config.vae.options() == {
        "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4
    } | {key: value for key, value in config.vae.options().items() if key == "mid_block_add_attention"}  # fmt: skip
    assert "dropout" not in config.unet.options()
    assert tiny_config(tmp_path, "+unet.dropout=0.0").unet.options()["dropout"] == 0.0


def test_a_run_config_is_read_back(tmp_path):
    config = tiny_config(tmp_path)
    assert load_run_config(tmp_path) is None
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(by_alias=True, mode="json")))
    assert load_run_config(tmp_path) == config


@pytest.mark.parametrize(
    "content", ["a: [1", "3", "", "a: 1", "!!python/object/apply:os.system ['touch pwned']"], ids=range(5)
)
def test_a_damaged_run_config_is_a_user_error(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError):
        load_run_config(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_every_script_has_a_schema_and_a_yaml_that_fits():
    for name in SCHEMAS:
        extra = {"train": [], "sample": ["ckpt=x", "prompt=y"], "evaluate": ["ckpt=x"], "convert": ["src=x", "dst=y"]}[
            name
        ]
        check(SCHEMAS[name], compose_values(name, extra))


HUB_IN_A_MIX = ["data=mix", "+source@data.sources.a=hub", "data.sources.a.path=x"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data=hub", "data.path=x", "data.streaming=true"], "it needs cache=false"),
        (["data=hub", "data.path=x", "data.streaming=true", "data.buckets=true"], "buckets=true must know all sizes"),
        (["data.cache=false", "data.cache_on_device=true"], "cache_on_device=true needs a cache"),
        (["data=mix"], "+source@data.sources.<name>=folder"),
        (["data=mix", "+source@data.sources.a=folder"], "config key 'data.sources.a.path' is missing"),
        (["data=mix", "+data.sources.a={kind: shapes}"], "must be one of hub, folder, shards, custom"),
        ([*HUB_IN_A_MIX, "data.sources.a.streaming=true"], "cannot stream"),
        ([*HUB_IN_A_MIX, "+data.sources.a.weight=0"], "weight"),
    ],
)
def test_sources_that_cannot_be_are_refused(overrides, says):
    assert says in complaint(TrainConfig, compose_values("train", overrides))


def test_a_mix_is_composed_of_sources():
    overrides = ["data=mix", "+source@data.sources.a=folder", "data.sources.a.path=x", "+data.sources.a.weight=2"]
    overrides += ["+source@data.sources.b=shards", "data.sources.b.path=[a.tar,b.tar]"]
    data = check(TrainConfig, compose_values("train", overrides)).data
    assert [(part.kind, part.path, part.weight) for part in data.sources.values()] == [
        ("folder", "x", 2), ("shards", ["a.tar", "b.tar"], 1),
    ]  # fmt: skip


def test_a_run_from_before_a_key_was_there_is_read(composed, tmp_path):
    config = check(TrainConfig, composed)
    values = config.model_dump(by_alias=True, mode="json")
    younger = {"data": "buckets", "diffusion": "weighting", "autoencoder": "l1", "trainer": "max_skipped"}
    for section, key in younger.items():
        del values[section][key]
    del values["doctor"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    assert load_run_config(tmp_path) == config
