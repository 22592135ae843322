"""Train CLIP: pictures and their captions are drawn together, all others pushed apart.

B batch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.conditioner import tokenize
from ldm.config import ClipStage
from ldm.nn.clip import CLIP
from ldm.training.module import StageModule


class ClipModule(StageModule):
    """LightningModule of the CLIP stage: both towers, from scratch, with the symmetric contrastive loss.

    CLIP (arXiv:2103.00020) Figure 3 and section 2.5: cross-entropy over the rows and over the columns of the scaled
    cosine similarities; the scale is learned, and kept at most 100.
    """

    stage = "clip"

    def __init__(self, clip: CLIP, tokenizer: Any, max_length: int, config: ClipStage, seed: int) -> None:
        super().__init__(clip, config.optim, config.max_steps, seed)
        self.tokenizer, self.max_length = tokenizer, max_length

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        self.log_losses(losses, len(batch["caption"]))
        return losses["loss"]

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        self.log_losses(self.losses(batch), len(batch["caption"]))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.network.logit_scale.clamp_(max=4.6052)  # type: ignore[operator]  # ln 100

    def losses(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the loss and the share of pictures whose own caption is the nearest in the batch."""
        input_ids = tokenize(self.tokenizer, batch["caption"], self.max_length).to(self.device)
        clip: CLIP = self.network  # type: ignore[assignment]
        text, image = clip.encode_text(input_ids), clip.encode_image(batch["image"])
        if self.training and self.trainer.world_size > 1:  # each picture is told apart from those of all ranks
            gathered: Any = [self.all_gather(each, sync_grads=True) for each in (text, image)]
            text, image = (each.flatten(0, 1) for each in gathered)
        logits = clip.compare(text, image)  # (B, B): a row for each picture
        own = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        return {"loss": loss, "recall": (logits.argmax(1) == own).float().mean()}
