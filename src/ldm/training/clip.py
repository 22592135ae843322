"""Train CLIP: pictures and their captions are drawn together, all others pushed apart.

B batch, P width of the common space.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.conditioner import tokenize
from ldm.config import ClipStage
from ldm.data.pictures import Pictures
from ldm.data.stream import Stream
from ldm.evaluation.clip_score import retrieve
from ldm.nn.clip import CLIP
from ldm.training.flops import count_flops, on_meta, twin
from ldm.training.module import StageModule, gathered

CAPTIONS = 256  # embedded at once in validation


class ClipModule(StageModule):
    """LightningModule of the CLIP stage: both towers, from scratch, with the symmetric contrastive loss.

    CLIP (arXiv:2103.00020) Figure 3 and section 2.5: cross-entropy over the rows and over the columns of the scaled
    cosine similarities; the scale is learned, and kept at most 100.
    """

    stage = "clip"

    def __init__(self, clip: CLIP, tokenizer: Any, max_length: int, config: ClipStage, seed: int) -> None:
        super().__init__(clip, config.optim, config.max_steps, seed)
        self.tokenizer, self.max_length = tokenizer, max_length
        self._seen: list[tuple[int, str, Tensor]] = []  # of each picture in validation: number, caption, embedding

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        losses = self.losses(*self.embed(batch))
        self.log_losses(losses, len(batch["caption"]))
        return losses["loss"]

    def embed(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the embeddings of captions and of pictures, (B, P) each, not normalised."""
        clip: CLIP = self.network  # type: ignore[assignment]
        return self._embed_captions(batch["caption"]), clip.encode_image(batch["image"])

    def _embed_captions(self, captions: Sequence[str]) -> Tensor:
        clip: CLIP = self.network  # type: ignore[assignment]
        return clip.encode_text(tokenize(self.tokenizer, captions, self.max_length).to(self.device))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.network.logit_scale.clamp_(max=4.6052)  # type: ignore[operator]  # ln 100

    def losses(self, text: Tensor, image: Tensor) -> dict[str, Tensor]:
        """Return the loss and the share of pictures whose own caption is the nearest in the batch.

        Args:
            text, image: (B, P) embeddings.
        """
        if self.training and self.trainer.world_size > 1:  # each picture is told apart from those of all ranks
            both: Any = [self.all_gather(each, sync_grads=True) for each in (text, image)]
            text, image = (each.flatten(0, 1) for each in both)
        clip: CLIP = self.network  # type: ignore[assignment]
        logits = clip.compare(text, image)  # (B, B): a row for each picture
        own = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return {"loss": loss, "recall": (logits.argmax(1) == own).float().mean()}

    def flops_per_image(self, batch: Mapping[str, Any]) -> int:
        """Count those of both towers; comparing what they say takes few."""
        clip: Any = twin(self.network)
        ids = torch.empty(1, self.max_length, dtype=torch.int64, device="meta")
        text = count_flops(lambda: clip.encode_text(ids))
        return text + count_flops(lambda: clip.encode_image(on_meta(batch["image"])))

    # ---------------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self._seen = []

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        text, image = self.embed(batch)
        self.log_losses({"loss": self.losses(text, image)["loss"]}, len(image))
        loader: Any = self.trainer.val_dataloaders
        indices = [index for index, _ in loader.batch_sampler[batch_idx]]
        self._seen += zip(indices, batch["caption"], image.float().cpu(), strict=True)

    def on_validation_epoch_end(self) -> None:
        """Log retrieval among all pictures that this validation has seen, on any rank, and all their captions."""
        seen = {index: (caption, embedding) for index, caption, embedding in gathered(self._seen)}
        order = sorted(seen)  # each once, as evaluation comes upon them
        pictures: Pictures = self.trainer.datamodule.val  # type: ignore[attr-defined]
        if isinstance(pictures.source, Stream):  # a picture that is broken has another in its place
            captions: list[Sequence[str]] = [[seen[index][0]] for index in order]
        else:
            captions = [pictures.captions[index] for index in order]
        found = retrieve(torch.stack([seen[index][1] for index in order]), captions, self._embed_all)
        for name, value in found.items():
            self.log(f"{self.stage}/val_{name}", value, sync_dist=True)

    def _embed_all(self, captions: Sequence[str]) -> Tensor:
        with self.trainer.precision_plugin.forward_context():
            parts = [self._embed_captions(captions[i : i + CAPTIONS]) for i in range(0, len(captions), CAPTIONS)]
        return torch.cat(parts).float().cpu()
