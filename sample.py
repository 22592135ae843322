"""Draw pictures from words with a trained model.

    python sample.py ckpt=outputs/shapes prompt="a large red circle on the left of a blue background" num_images=4
    python sample.py ckpt=outputs/shapes prompt_file=prompts.txt guidance_scale=5 sampler=dpmpp_2m out=pictures
    python sample.py ckpt=outputs/shapes prompt="a small green star" init_image=photo.jpg mask=mask.png
    python sample.py from_image=samples/0000-0-a-small-green-star.png

Whatever is not said comes from the model. Prompts and paths are typed as they are: commas, quotes, any letters.
"""

from typing import Any

from ldm import cli


def main(cfg: Any) -> None:
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from ldm.sampling import sample

    stated = [override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task]
    sample(OmegaConf.to_container(cfg, resolve=True), stated)  # type: ignore[arg-type]


if __name__ == "__main__":
    cli.run(main, "sample", __doc__)
