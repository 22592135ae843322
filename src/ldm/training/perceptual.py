"""LPIPS (arXiv:1801.03924): how different two pictures look, by the features of a network that classifies ImageNet.

torchmetrics brings the maintained code and the learned linear heads, torchvision the backbones; their weights come from
a local file or the cache of `torch.hub`.

B batch, H W pixels.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import PerceptualLoss
from ldm.errors import UserError
from ldm.ranks import main_process, say
from ldm.weights.tensors import read_weights

BACKBONES = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}


class LPIPS(nn.Module):
    """The distance of arXiv:1801.03924 Eq. 1, with the backbone and the heads frozen.

    Gradients flow to the pictures, and to nothing else. It is a mean over positions, whatever the resolution.

    Args:
        config: backbone and where its weights are.

    Raises:
        UserError: the weights cannot be had, or are of another network.
    """

    def __init__(self, config: PerceptualLoss) -> None:
        # The public class downloads the backbone's weights itself; this is what it wraps.
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        super().__init__()
        state = load_backbone(config.net, config.weights)
        self.lpips = _NoTrainLpips(net=config.net, pnet_rand=True)
        # Theirs are torchvision's layers, cut into slices: slice2.5.weight is features.5.weight.
        names = {name: re.sub(r"^slices?\.?\d+\.", "features.", name) for name in self.lpips.net.state_dict()}
        if missing := [name for name in names.values() if name not in state]:
            raise UserError(
                f"autoencoder.perceptual.weights={config.weights} holds no weights of torchvision's "
                f"{BACKBONES[config.net]}: {missing[0]} is missing"
            )
        try:
            self.lpips.net.load_state_dict({name: state[theirs] for name, theirs in names.items()})
        except RuntimeError as error:
            raise UserError(
                f"autoencoder.perceptual.weights={config.weights} does not fit torchvision's "
                f"{BACKBONES[config.net]}: {str(error).splitlines()[-1].strip()}"
            ) from error
        self.requires_grad_(False)

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        """Return the float32 distance of each pair, (B,), of images (B, 3 or 1, H, W) in about [-1, 1]."""
        return self.lpips(image, other).flatten().float()


def load_backbone(net: str, weights: str | None) -> dict[str, Tensor]:
    """Read a backbone's weights from a file in torchvision's format, or from the cache of `torch.hub`.

    What the cache does not hold is downloaded into it.

    Raises:
        UserError: they cannot be had; says which file to put where.
    """
    if weights is not None:
        try:
            return read_weights(Path(weights))
        except UserError as error:
            raise UserError(f"autoencoder.perceptual.weights: {error}") from error
    from torchvision.models import get_model_weights

    kind: Any = get_model_weights(BACKBONES[net])
    url = kind.DEFAULT.url
    place = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    try:
        if not place.exists():
            say(f"  {url} to {place}")
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(place), place.stem.rpartition("-")[2], progress=main_process())
        return read_weights(place)
    except Exception as error:  # the network, the disk, the hash: each raises something else
        raise UserError(
            f"autoencoder.perceptual needs the weights of torchvision's {BACKBONES[net]}, and {place} "
            f"{'is not good' if place.exists() else 'is not there and cannot be downloaded'} ({error}). Put {url} "
            "there, or anywhere with autoencoder.perceptual.weights=<file>; or train without LPIPS "
            "(autoencoder.perceptual=null)"
        ) from error
