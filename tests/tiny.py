"""The whole road at the smallest size: configs, networks and runs that take seconds. Shared by tests.

The real YAML is composed, and every number that decides the work is overridden, so that tuning the built-in
experiment moves no test.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldm.cli import CONF_DIR
from ldm.config import TrainConfig, check

ROOT = CONF_DIR.parent

# 16 px pictures, 8 px latents, every network a few thousand parameters, a few steps a stage.
OVERRIDES = (
    "experiment=shapes",
    "data.resolution=16", "data.num_train=64", "data.num_val=8", "data.batch_size=8", "data.num_workers=0",
    "vae.block_out_channels=[8,8]", "vae.layers_per_block=1", "vae.norm_num_groups=4", "vae.latent_channels=4",
    "text_encoder.projection_dim=8", "text_encoder.vocab_size=600", "text_encoder.max_length=16",
    "text_encoder.text.hidden_size=16", "text_encoder.text.intermediate_size=32",
    "text_encoder.text.num_hidden_layers=1", "text_encoder.text.num_attention_heads=2",
    "text_encoder.vision.hidden_size=16", "text_encoder.vision.intermediate_size=32",
    "text_encoder.vision.num_hidden_layers=1", "text_encoder.vision.num_attention_heads=2",
    "text_encoder.vision.patch_size=8",
    "unet.block_out_channels=[8,16]", "unet.layers_per_block=1", "unet.attention_head_dim=2", "+unet.norm_num_groups=4",
    "autoencoder.max_steps=3", "autoencoder.batch_size=8", "autoencoder.optim.warmup_steps=0",
    "clip.max_steps=3", "clip.batch_size=8", "clip.optim.warmup_steps=0",
    "optim.warmup_steps=0", "trainer.max_steps=3", "trainer.val_every=2", "trainer.val_batches=1",
    "trainer.checkpoint_every=2", "callbacks.samples.every=100", "callbacks.samples.num_images=2", "sampling.steps=2",
)  # fmt: skip


def compose_values(config_name: str, overrides: Sequence[str] = (), config_dir: Path = CONF_DIR) -> dict[str, Any]:
    """Compose as Hydra does for a script, and resolve."""
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose(config_name, list(overrides)), resolve=True)
    return values


def config(output_dir: Path | str, *overrides: str) -> TrainConfig:
    """Return the checked config of the tiny experiment; `overrides` are said last."""
    return check(TrainConfig, compose_values("train", [*OVERRIDES, f"output_dir={output_dir}", *overrides]))


def run_script(name: str, *arguments: str) -> int:
    """Run a root script in this process, as typed; return its exit code."""
    import importlib.util
    from unittest import mock

    from ldm import cli

    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"{name}.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with mock.patch.object(sys, "argv", [str(ROOT / f"{name}.py"), *arguments]):
        try:
            cli.run(script.main, name, script.__doc__)
        except SystemExit as exit:
            return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    return 0
