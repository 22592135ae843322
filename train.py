"""Train a text-to-image latent diffusion model, stage by stage: VAE, CLIP, U-Net.

    python train.py experiment=shapes                    the built-in experiment, offline, on a laptop
    python train.py experiment=pokemon trainer=ddp       captioned Pokémon at 512 px on every GPU
    python train.py experiment=shapes optim.lr=1e-3      any value, by its dotted name
    python train.py -m experiment=shapes unet=tiny,small a sweep

The same command again goes on where it was, or says that everything is up to date.
"""

from typing import Any

from ldm import cli


def main(cfg: Any) -> float | None:
    from ldm.training.jobs import run_from_hydra

    return run_from_hydra(cfg)


if __name__ == "__main__":
    cli.run(main, "train", __doc__)
