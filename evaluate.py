"""Measure how well a trained model does what it is told, how real its pictures are, and whether it copies.

    python evaluate.py ckpt=outputs/shapes
    python evaluate.py ckpt=outputs/shapes metrics=[clip_score,clip_frechet] guidance_scale=[1,2,4]

Writes evaluation.json (and sheets of pictures, and plots) into the run directory and prints tables.
"""

from typing import Any

from ldm import cli


def main(cfg: Any) -> None:
    from omegaconf import OmegaConf

    from ldm.config import EvaluateConfig, check

    values: Any = OmegaConf.to_container(cfg, resolve=True)
    check(EvaluateConfig, values)  # before anything that takes seconds to import
    from ldm.evaluation.evaluate import evaluate
    from ldm.progress import progress

    evaluate(values, progress)


if __name__ == "__main__":
    cli.run(main, "evaluate", __doc__)
