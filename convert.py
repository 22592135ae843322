"""Turn a model into another format: a folder as diffusers has it, or one safetensors file in the original names.

    python convert.py src=outputs/shapes dst=shapes.safetensors
    python convert.py src=v1-5-pruned-emaonly.safetensors dst=sd15 dtype=fp16
    python convert.py src=stabilityai/sd-vae-ft-mse dst=vae.safetensors
    python convert.py src=outputs/shapes dst=shapes-008 ema=0.08      another average of its weights (docs/presets.md)

A VAE or a U-Net by itself is converted as well. Parts may be mixed: vae=… text_encoder=… unet=… tokenizer=…
"""

from typing import Any

from ldm import cli


def main(cfg: Any) -> None:
    from omegaconf import OmegaConf

    from ldm.weights.convert import convert

    convert(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]


if __name__ == "__main__":
    cli.run(main, "convert", __doc__)
