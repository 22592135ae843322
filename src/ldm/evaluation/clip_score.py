"""How well pictures and captions go together, as a CLIP sees it: CLIP score, and zero-shot retrieval.

N pictures, M captions, P width of CLIP's common space.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.evaluation.subject import Subject


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Return the CLIP score: the mean of 100 · max(cos(picture, caption), 0).

    Hessel et al. (arXiv:2104.08718) section 3:  CLIP-S = w · max(cos(c, v), 0). Theirs has w = 2.5, most tables since
    have w = 100, as here; times 0.025 this is theirs.

    Args:
        images, texts: (N, P) embeddings each, of any length.
    """
    return float(100 * F.cosine_similarity(images.double(), texts.double()).clamp(min=0).mean())


def recall(images: Tensor, texts: Tensor, owns: Tensor, ranks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """Measure zero-shot retrieval: how often what is nearest by cosine is right, from pictures to captions and back.

    CLIP (arXiv:2103.00020) section 3.1 and Table 13 (recall@k); where a picture has several captions, or a caption
    several pictures, one of them among the k nearest is enough, as in Karpathy and Fei-Fei (arXiv:1412.2306).

    Args:
        images: (N, P) embeddings.
        texts: (M, P) embeddings of captions, each caption once.
        owns: (N, M) bool: which captions are true of which picture; at least one in each row and column.
        ranks: k.

    Returns:
        `image_to_text@k` over the pictures and `text_to_image@k` over the captions, in [0, 1].
    """
    similarity = F.normalize(images.double(), dim=1) @ F.normalize(texts.double(), dim=1).T
    found = {}
    for way, scores, right in (("image_to_text", similarity, owns), ("text_to_image", similarity.T, owns.T)):
        for k in ranks:
            nearest = scores.topk(min(k, scores.shape[1]), dim=1).indices
            found[f"{way}@{k}"] = float(right.gather(1, nearest).any(1).float().mean())
    return found


def retrieve(
    images: Tensor, captions: Sequence[Sequence[str]], embed: Callable[[Sequence[str]], Tensor]
) -> dict[str, float]:
    """Measure retrieval between pictures and all their captions; a text that several pictures have is right for each.

    Args:
        images: (N, P) embeddings.
        captions: of each of the N pictures, one at least.
        embed: maps M texts to (M, P) embeddings.

    Returns:
        See `recall`.
    """
    texts = distinct(captions)
    column = {text: i for i, text in enumerate(texts)}
    owns = torch.zeros(len(captions), len(texts), dtype=torch.bool)
    for row, own in enumerate(captions):
        owns[row, [column[text] for text in own]] = True
    return recall(images, embed(texts), owns)


def distinct(captions: Sequence[Sequence[str]]) -> list[str]:
    """Return every caption once, in the order of the pictures."""
    return list(dict.fromkeys(text for texts in captions for text in texts))


def clip_scores(subject: Subject) -> dict[str, Any]:
    """Score the pictures of each setting with their prompts; `real` is the figure of the held-out pictures."""
    prompts = subject.prompts()
    texts = subject.clip.texts(prompts)
    values = [
        {**setting._asdict(), "value": clip_score(subject.drawn_features("clip", setting), texts)}
        for setting in subject.settings
    ]
    real = subject.real_features("clip", "val")
    owners = torch.arange(len(prompts)) % len(real)
    return {"values": values, "real": clip_score(real[owners], texts), "clip": subject.clip.source}


def retrieval(subject: Subject) -> dict[str, Any]:
    """Measure how well the CLIP finds captions of held-out pictures, and pictures of held-out captions."""
    captions = [list(texts) for texts in subject.real("val").captions]
    found = retrieve(subject.real_features("clip", "val"), captions, subject.clip.texts)
    return {**found, "num_images": len(captions), "num_captions": len(distinct(captions)), "clip": subject.clip.source}
