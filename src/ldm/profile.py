"""Profile a training step: where its time goes, as a table and as a flame graph.

    python -m ldm.profile experiment=shapes                          the U-Net's step, from the cache and without it
    python -m ldm.profile experiment=shapes stages=[autoencoder]     that of the last stage named
    python -m ldm.profile experiment=pokemon trainer=gpu             any config of train.py

What is not trained yet is built: it costs the same. The table is printed; table, flame graphs (SVG, open them in a
browser) and traces (JSON, for ui.perfetto.dev) go to `profile/` in the run's directory.
"""

from typing import Any

from ldm import cli


def main(cfg: Any) -> None:
    from omegaconf import OmegaConf

    from ldm.config import TrainConfig, check
    from ldm.training.profiling import profile

    values: Any = OmegaConf.to_container(cfg, resolve=True)
    profile(check(TrainConfig, values))


if __name__ == "__main__":
    cli.run(main, "train", __doc__)
