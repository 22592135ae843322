"""The demo's experiment at its real sizes, and its result in other tools' hands.

`LDM_DEMO=outputs/shapes` points the test at the demo's own result; without it the same networks are trained for a few
steps first. diffusers must draw what `sample.py` draws.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PROMPT = "a large red circle on the left of a blue background"
pytestmark = pytest.mark.slow


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if folder := os.environ.get("LDM_DEMO"):
        return (ROOT / folder).resolve()
    output_dir = tmp_path_factory.mktemp("outputs")
    run(
        "train.py", "experiment=shapes", f"output_dir={output_dir}", "data.num_train=512", "data.num_val=16",
        "autoencoder.max_steps=20", "clip.max_steps=10", "trainer.max_steps=20", "trainer.val_every=20",
    )  # fmt: skip
    return output_dir / "shapes"


def test_diffusers_draws_the_same_picture(demo: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(demo / "model")
    pipeline.set_progress_bar_config(disable=True)
    import torch

    for steps, guidance_scale in ((20, 3.0), (10, 1.0)):
        out = tmp_path / f"{steps}"
        run(
            "sample.py", f"ckpt={demo}", f"prompt={PROMPT}", "seed=7", f"steps={steps}", "sampler=ddim",
            f"guidance_scale={guidance_scale}", f"out={out}",
        )  # fmt: skip
        [path] = out.glob("0000-7-*.png")
        ours = np.asarray(Image.open(path), np.float64)
        generator = torch.Generator().manual_seed(7)
        theirs = pipeline(
            PROMPT, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generator, output_type="np"
        ).images[0]
        error = np.mean((ours / 255 - np.round(theirs * 255) / 255) ** 2)
        assert ours.std() > 0
        assert -10 * np.log10(max(error, 1e-12)) >= 45


def test_latents_of_held_out_pictures_are_normal(demo: Path) -> None:
    """Mean 0 and variance 1 per channel, in our hands and in diffusers'."""
    import torch
    from diffusers import AutoencoderKL as Oracle

    from ldm.data.images import to_tensor
    from ldm.data.shapes import Shapes
    from ldm.nn.autoencoder import AutoencoderKL
    from ldm.weights.folder import load_network

    vae = load_network(AutoencoderKL, demo / "model" / "vae")
    oracle = Oracle.from_pretrained(demo / "model" / "vae")
    held_out = Shapes("val", num_images=256, resolution=32)
    image = to_tensor(np.stack([held_out[i]["image"] for i in range(256)]))
    with torch.inference_mode():
        moments = vae.encode(image)
        latents = vae.latents(moments, torch.randn(moments.chunk(2, 1)[0].shape))
        theirs = oracle.encode(image).latent_dist.mean * oracle.config.scaling_factor
        assert torch.allclose(vae.latents(moments), theirs, atol=1e-4)
        assert torch.allclose(
            vae.image(latents), oracle.decode(latents / oracle.config.scaling_factor).sample, atol=1e-4
        )
    # 256 pictures, each about one independent value a channel: three standard errors
    assert latents.mean((0, 2, 3)).abs().max() < 0.19
    assert (latents.var((0, 2, 3)) - 1).abs().max() < 0.27
