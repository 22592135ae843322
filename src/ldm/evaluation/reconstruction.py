"""How much of a picture survives the VAE: PSNR and SSIM of held-out pictures, and how it looks.

N pictures, C channels, H W pixels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.images import to_pixels
from ldm.errors import UserError
from ldm.evaluation.distances import frechet_distance
from ldm.evaluation.features import cached_inception
from ldm.evaluation.real import to_rgb
from ldm.evaluation.subject import Subject
from ldm.gallery import grid, save_png
from ldm.weights.tensors import read_weights

BEST_PSNR = 100.0  # dB; stands for infinity, that of two equal pictures
SHOWN = 8
ALEXNET = "alexnet-owt-7be5be79.pth"  # as torchvision names it in PyTorch's hub cache


def psnr(found: Tensor, true: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each picture in dB, 10 log10(MAX² / MSE) with MAX = 255; at most 100.

    Args:
        found, true: (N, C, H, W) uint8.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    ratios = peak_signal_noise_ratio(found.double(), true.double(), data_range=255.0, reduction="none", dim=(1, 2, 3))
    return ratios.clamp(max=BEST_PSNR)


def ssim(found: Tensor, true: Tensor) -> Tensor:
    """Return the structural similarity of each picture, over Gaussian windows of σ = 1.5 and 11 pixels.

    Wang et al. 2004 (doi:10.1109/TIP.2003.819861) Eq. 13, K_1 = 0.01, K_2 = 0.03, mean over windows and channels.

    Args:
        found, true: (N, C, H, W) uint8, H and W at least 11.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarity: Any = structural_similarity_index_measure(
        found.double(), true.double(), data_range=255.0, reduction="none"
    )
    return similarity.reshape(-1)


@torch.inference_mode()
def reconstruction(subject: Subject) -> dict[str, Any]:
    """Send held-out pictures through the VAE and back, by the mean of the posterior.

    Where Inception is at hand (named, or in the hub cache) its Fréchet distance is `rfid`, where a CLIP is, that over
    its embeddings is `clip_frechet`; where torchvision's AlexNet is in the hub cache `lpips` is the mean LPIPS over it.
    """
    real, pipeline = subject.real("val"), subject.pipeline
    if subject.channels != pipeline.vae.config["out_channels"]:
        raise UserError(
            f"reconstruction compares pictures with themselves, and the VAE turns {subject.channels} channels into "
            f"{pipeline.vae.config['out_channels']}"
        )
    ratios, similarities, eyes = [], [], _eyes(subject)
    lpips = load_lpips(subject.device) if subject.pipeline.default_size >= 32 else None  # AlexNet halves five times
    before: dict[str, list[Tensor]] = {name: [] for name in eyes}
    after: dict[str, list[Tensor]] = {name: [] for name in eyes}
    sheet: list[Any] = []
    with subject.progress("reconstructing", len(real), "pictures") as advance:
        for indices in np.array_split(np.arange(len(real)), -(-len(real) // subject.config.batch_size)):
            image = real.images(indices)
            latents = pipeline.vae.latents(pipeline.codec.encode(image))
            pixels, again = to_pixels(image), to_pixels(pipeline.decode(latents))
            true, found = (torch.from_numpy(each).movedim(-1, 1) for each in (pixels, again))
            ratios.append(psnr(found, true))
            similarities.append(ssim(found, true))
            pixels, again = (to_rgb(each, subject.background) for each in (pixels, again))
            for name, eye in eyes.items():
                before[name].append(eye.images(pixels))
                after[name].append(eye.images(again))
            if lpips is not None:
                lpips.update(
                    *(
                        torch.from_numpy(each).movedim(-1, 1).float().to(subject.device) / 127.5 - 1
                        for each in (again, pixels)
                    )
                )
            sheet += [*zip(pixels, again, strict=True)][: SHOWN - len(sheet)]
            advance(len(indices))
    results: dict[str, Any] = {
        "psnr": float(torch.cat(ratios).mean()),
        "ssim": float(torch.cat(similarities).mean()),
        "num_images": len(real),
    }
    for name in eyes if len(real) > 1 else ():
        results[name] = frechet_distance(torch.cat(before[name]), torch.cat(after[name]))
    if lpips is not None:
        results["lpips"] = float(lpips.compute())
    path = subject.file("reconstruction")
    pictures = [pair[0] for pair in sheet] + [pair[1] for pair in sheet]
    save_png(path, grid(pictures, columns=len(sheet), scale=max(1, 128 // pictures[0].shape[0])))
    subject.say(f"held-out pictures and, below, what the VAE makes of them: {path}")
    return {**results, "sheet": path.name}


def load_lpips(device: torch.device) -> Any:
    """Load LPIPS over AlexNet (arXiv:1801.03924 Eq. 1) by torchmetrics; None where the hub cache has no AlexNet.

    Raises:
        UserError: the file there holds anything but weights.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not file.is_file():
        return None
    read_weights(file)  # torchvision would unpickle whatever it holds
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex").to(device)


def _eyes(subject: Subject) -> dict[str, Any]:
    """Return what can look at the reconstructions without anything being fetched for it, under the metric's name."""
    eyes: dict[str, Any] = {}
    if subject.config.inception is not None or cached_inception().is_file():
        eyes["rfid"] = subject.inception
    if subject.clip_source is not None:
        eyes["clip_frechet"] = subject.clip
    return eyes
