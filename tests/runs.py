"""Whole runs at the smallest size: configs that train in a second, and the root scripts called as typed."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ldm import cli
from ldm.config import TrainConfig, check

ROOT = cli.CONF_DIR.parent

# The built-in experiment with every number that decides the work said here, so that tuning it moves no test:
# 16 px pictures, 8 px latents, networks of some thousand parameters, three steps a stage.
TINY = (
    "experiment=shapes",
    "data.resolution=16", "data.num_train=64", "data.num_val=8", "data.batch_size=8", "data.num_workers=0",
    "vae.block_out_channels=[8,8]", "vae.layers_per_block=1", "vae.norm_num_groups=4", "vae.latent_channels=4",
    "text_encoder.projection_dim=8", "text_encoder.vocab_size=600", "text_encoder.max_length=20",
    "text_encoder.text.hidden_size=16", "text_encoder.text.intermediate_size=32",
    "text_encoder.text.num_hidden_layers=1", "text_encoder.text.num_attention_heads=2",
    "text_encoder.vision.hidden_size=16", "text_encoder.vision.intermediate_size=32",
    "text_encoder.vision.num_hidden_layers=1", "text_encoder.vision.num_attention_heads=2",
    "text_encoder.vision.patch_size=8",
    "unet.block_out_channels=[8,16]", "unet.layers_per_block=1", "unet.attention_head_dim=2",
    "++unet.down_block_types=[CrossAttnDownBlock2D,CrossAttnDownBlock2D]",
    "++unet.up_block_types=[CrossAttnUpBlock2D,CrossAttnUpBlock2D]", "++unet.norm_num_groups=4",
    "autoencoder.max_steps=3", "autoencoder.batch_size=8", "autoencoder.precision=32-true",
    "autoencoder.optim.warmup_steps=0",
    "clip.max_steps=3", "clip.batch_size=8", "clip.optim.warmup_steps=0",
    "optim.warmup_steps=0", "trainer.max_steps=3", "trainer.val_every=2", "trainer.val_batches=1",
    "trainer.checkpoint_every=2", "callbacks.samples.every=100", "callbacks.samples.num_images=2", "sampling.steps=2",
    "evaluation.metrics=[]",
)  # fmt: skip

# The same over pictures of one's own, which the test names.
TINY_OWN = (
    *(item for item in TINY if not item.startswith(("experiment=", "data.num_train"))),
    "vae=tiny", "text_encoder=tiny", "unet=tiny", "data.num_val=4",
)  # fmt: skip
# The same over pretrained encoders, of which only the U-Net is trained.
SMALL = [
    "data.resolution=16", "data.num_val=2", "data.batch_size=4", "data.num_workers=0", "unet=tiny",
    *(item for item in TINY if "unet." in item),
    "trainer=cpu", "trainer.max_steps=2", "trainer.val_every=2", "trainer.val_batches=1", "sampling.steps=2",
    "callbacks.samples.every=100", "callbacks.samples.num_images=2", "optim.warmup_steps=0",
]  # fmt: skip


def compose_values(config_name: str, overrides: Sequence[str] = (), config_dir: Path = cli.CONF_DIR) -> dict[str, Any]:
    """Compose as Hydra does for a script, and resolve."""
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose(config_name, list(overrides)), resolve=True)
    return values


def tiny_config(output_dir: Path | str, *overrides: str) -> TrainConfig:
    """Return the checked config of the tiny experiment; `overrides` are said last."""
    return check(TrainConfig, compose_values("train", [*TINY, f"output_dir={output_dir}", *overrides]))


def tiny_own_config(output_dir: Path | str, *overrides: str) -> TrainConfig:
    """Return the checked config of the tiny experiment over a folder of pictures, `data.path=…`."""
    said = [*TINY_OWN, "data=folder", f"output_dir={output_dir}", *overrides]
    return check(TrainConfig, compose_values("train", said))


def run_script(name: str, *arguments: str) -> int:
    """Run a root script in this process, as typed; return its exit code."""
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
