"""Draw pictures from words with a trained model.

    python sample.py ckpt=outputs/shapes prompt="a large red circle on the left of a blue background" num_images=4
    python sample.py ckpt=outputs/shapes prompt_file=prompts.txt guidance_scale=5 steps=50 out=pictures

Whatever is not said comes from the model folder. Prompts are typed as they are: commas, quotes, any letters.
"""

from typing import Any

from ldm import cli


def main(cfg: Any) -> None:
    from omegaconf import OmegaConf

    from ldm.sampling import sample

    sample(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]


if __name__ == "__main__":
    cli.run(main, "sample", __doc__)
