"""What looks at pictures: any CLIP, and Inception as FID knows it.

N pictures, H W pixels, P width of CLIP's common space. Pictures are (N, H, W, 3) uint8, H = W, as a PNG holds them.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.data.images import Pixels
from ldm.errors import UserError
from ldm.files import load_json
from ldm.weights.folder import NETWORKS
from ldm.weights.hub import find_part, part_folder
from ldm.weights.model import load_part
from ldm.weights.tensors import read_weights
from ldm.weights.tokenizer import load_text_tokenizer

# Mean and standard deviation of the pictures that OpenAI trained CLIP on, as every CLIP in transformers' format takes
# them unless its preprocessor_config.json says otherwise. Ours see pictures in [-1, 1].
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
OURS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
RESULT = "stage.json"  # lies beside a CLIP that was trained here

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"


class ClipFeatures:
    """Both towers of a CLIP, from pictures and captions to embeddings.

    Args:
        source: folder in transformers' `CLIPModel` format with its tokenizer, the result of a CLIP stage, or a hub id.
        device: to run on.

    Raises:
        UserError: it cannot be had, or holds no CLIP.
    """

    def __init__(self, source: str, device: torch.device) -> None:
        folder = find_part(source, "clip", option="clip")
        if folder.is_file():
            raise UserError(f"clip={source} is a file: name a folder in transformers' format, or a hub id")
        if part_folder(folder, "tokenizer") is None and part_folder(folder.parent, "tokenizer") is not None:
            source = str(folder.parent)  # a stage's result was named by its inner folder
        clip: Any = load_part(NETWORKS["clip"], str(folder), option="clip")
        self.source, self.device = source, device
        self.tokenizer = load_text_tokenizer(source, clip.text_model, "clip")
        self.clip = clip.to(device).eval().requires_grad_(False)
        self.side: int = clip.vision_model.config["image_size"]
        self.max_length = min(self.tokenizer.model_max_length, clip.text_model.config["max_position_embeddings"])
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in _normalisation(folder))

    @torch.inference_mode()
    def images(self, pictures: Pixels) -> Tensor:
        """Embed pictures: (N, P) float32, not normalised. They are scaled by antialiased bicubic interpolation."""
        from torchvision.transforms.functional import InterpolationMode, resize

        pixels = torch.from_numpy(pictures).movedim(-1, 1)
        if pixels.shape[-1] != self.side:
            pixels = resize(pixels, [self.side, self.side], InterpolationMode.BICUBIC, antialias=True)
        image = (pixels.float() / 255 - self.mean) / self.std
        return self.clip.encode_image(image.to(self.device)).float().cpu()

    @torch.inference_mode()
    def texts(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        """Embed captions, cut to the tokens that the tower reads: (N, P) float32, not normalised."""
        found = []
        for begin in range(0, len(captions), batch_size):
            chunk = list(captions[begin : begin + batch_size])
            ids = self.tokenizer(
                chunk, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
            )["input_ids"]
            found.append(self.clip.encode_text(ids.to(self.device)).float().cpu())
        return torch.cat(found)


def _normalisation(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and standard deviation that a CLIP expects pictures in [0, 1] to be normalised by."""
    file = folder / "preprocessor_config.json"
    if file.is_file():
        told = load_json(file)
        mean, std = (told.get(name, default) for name, default in zip(("image_mean", "image_std"), OPENAI, strict=True))
        if all(isinstance(v, list | tuple) and len(v) == 3 and all(isinstance(x, float | int) for x in v)
               for v in (mean, std)) and all(std):  # fmt: skip
            return mean, std
        raise UserError(f"{file}: image_mean and image_std must be three numbers each, these are {mean} and {std}")
    return OURS if (folder.parent / RESULT).is_file() else OPENAI


class InceptionFeatures:
    """Inception v3 as FID was defined on it, by torch-fidelity: (N, 2048) features of pictures.

    Args:
        weights: file that holds torch-fidelity's weights; None for PyTorch's hub cache, downloaded where it has none.
        device: to run on.
        option: of the config that names the file.
        instead: what can be done without it.

    Raises:
        UserError: the weights cannot be had, or are not Inception's.
    """

    num_features = 2048

    def __init__(
        self,
        weights: str | None,
        device: torch.device,
        option: str = "inception",
        instead: str = "metrics=[clip_frechet,cmmd] compare by CLIP",
    ) -> None:
        state = read_weights(_inception_file(weights, option, instead))
        # torch-fidelity would unpickle whatever the file holds: it gets bytes that we have written ourselves.
        buffer = io.BytesIO()
        torch.save({name: tensor.contiguous() for name, tensor in state.items()}, buffer)
        buffer.seek(0)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            network: nn.Module = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], buffer)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{weights or cached_inception()} does not hold torch-fidelity's weights of Inception: {reason}"
            ) from None
        self.network, self.device = network.to(device), device

    @torch.inference_mode()
    def images(self, pictures: Pixels) -> Tensor:
        """Return (N, 2048) float32 features; torch-fidelity scales to 299 pixels as TensorFlow 1 did."""
        pixels = torch.from_numpy(pictures).movedim(-1, 1)
        with torch.autocast(self.device.type, enabled=False):  # in validation too the figure is that of float32
            # Each picture is blown up to 299 pixels: few at a time.
            return torch.cat([self.network(part.to(self.device))[0].float().cpu() for part in pixels.split(32)])

    def to(self, device: torch.device) -> "InceptionFeatures":
        """Run there from now on."""
        self.network, self.device = self.network.to(device), device
        return self


def cached_inception() -> Path:
    """Return where PyTorch's hub cache keeps Inception's weights, whether they are there or not."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION


def _inception_file(weights: str | None, option: str, instead: str) -> Path:
    if weights is not None:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UserError(f"{option}={weights}: there is no such file (seen from {Path.cwd()})")
        return path
    path = cached_inception()
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix="6726825d", progress=False)
        except Exception as error:  # no network, no such address, another file: for the user one and the same
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(
                f"FID and KID look with Inception, whose weights cannot be had ({reason}): download {INCEPTION_URL} to "
                f"{path}, or name the file with {option}=…; without them {instead}"
            ) from error
    return path
