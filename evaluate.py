"""Measure how well a trained model does what it is told.

    python evaluate.py ckpt=outputs/shapes

Writes evaluation.json (and a sheet of pictures) into the run directory and prints a table.
"""

from typing import Any

from ldm import cli


def main(cfg: Any) -> None:
    from omegaconf import OmegaConf

    from ldm.evaluation.evaluate import evaluate

    evaluate(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]


if __name__ == "__main__":
    cli.run(main, "evaluate", __doc__)
