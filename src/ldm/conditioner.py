"""Captions to context: the tokenizer and the text tower that a U-Net listens to, and the null caption.

B batch, L tokens, D width.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ldm.nn.clip import TextTower

NULL_CAPTION = ""
"""What "no caption" is, in training and in sampling alike; diffusers' pipelines say the same."""


class Conditioner(nn.Module):
    """Turn captions into context: tokenize, cut or pad to the tokenizer's length, run the text tower.

    The context is the tower's last hidden state after its final layer norm, padding included and unmasked, as in
    Stable Diffusion (arXiv:2112.10752 and its released code).

    Args:
        tokenizer: a `transformers.CLIPTokenizer`.
        text_tower: embeds at least the tokenizer's vocabulary and length.

    Raises:
        ValueError: the tokenizer's vocabulary is larger than the tower's embedding, or it cannot cut and pad.
    """

    def __init__(self, tokenizer: Any, text_tower: TextTower) -> None:
        super().__init__()
        num_tokens, limit = 1 + max(tokenizer.get_vocab().values(), default=-1), tokenizer.model_max_length
        if num_tokens > text_tower.config["vocab_size"]:
            raise ValueError(
                f"the tokenizer has {num_tokens} tokens, the text encoder embeds {text_tower.config['vocab_size']}"
            )
        if not isinstance(limit, int | float) or not limit >= 2:  # begin and end
            raise ValueError(f"the tokenizer's model_max_length is {limit!r}, no number of tokens")
        self.tokenizer = tokenizer
        self.text_tower = text_tower
        self.num_layers: int = text_tower.config["num_hidden_layers"]
        self.max_length = int(min(limit, text_tower.config["max_position_embeddings"]))
        try:
            ids = self.tokenize([NULL_CAPTION, "a"])
        except Exception as error:  # its files may say anything
            raise ValueError(f"the tokenizer cannot be used: {error}") from error
        if ids.shape != (2, self.max_length):
            raise ValueError(f"the tokenizer makes {ids.shape[1]} tokens where {self.max_length} are asked for")

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Return (B, L) int64 token ids; captions longer than L are cut, shorter ones padded."""
        return tokenize(self.tokenizer, captions, self.max_length)

    def forward(self, captions: Sequence[str], clip_skip: int = 0) -> Tensor:
        """Return the context of captions, (B, L, D).

        Args:
            captions: B texts.
            clip_skip: leave out this many of the tower's last layers, as diffusers counts them.

        Raises:
            ValueError: `clip_skip` leaves no layer.
        """
        device = self.text_tower.embeddings.token_embedding.weight.device
        hidden, _ = self.text_tower(self.tokenize(captions).to(device), clip_skip)
        return hidden

    def null_context(self) -> Tensor:
        """Return the context of the null caption, (L, D)."""
        return self([NULL_CAPTION])[0]

    def num_tokens(self, caption: str) -> int:
        """Count a caption's tokens, begin and end included, before it is cut to L."""
        return len(self.tokenizer(caption, verbose=False)["input_ids"])


def tokenize(tokenizer: Any, captions: Sequence[str], max_length: int) -> Tensor:
    """Return (B, max_length) int64 token ids, cut and padded."""
    batch = tokenizer(list(captions), padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")
    return batch["input_ids"]


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_length: int) -> Any:
    """Train CLIP's byte-pair vocabulary on captions.

    CLIP (arXiv:2103.00020) section 2.4: lower-cased byte-pair encoding between a begin and an end token. Every byte
    is in the vocabulary, inside a word and at its end, so that no text is unknown.

    Args:
        captions: text to learn merges from.
        vocab_size: at most so many tokens, 514 of them bytes and the two special ones.
        max_length: tokens a caption is cut and padded to.

    Returns:
        A `transformers.CLIPTokenizer`, a function of the captions alone: the same in every process.

    Raises:
        ValueError: `vocab_size` leaves no room for the bytes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    begin, end = "<|startoftext|>", "<|endoftext|>"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    if vocab_size < len(base) + 2:
        raise ValueError(f"vocab_size={vocab_size}: bytes and special tokens alone are {len(base) + 2}")
    template = CLIPTokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = template.normalizer, template.pre_tokenizer
    # Equal counts are decided by ids: naming the bytes as special tokens fixes theirs, where the trainer would hand
    # them out in the order of a hash table, another one in each process.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2, end_of_word_suffix="</w>", special_tokens=list(base), show_progress=False
    )
    bpe.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = dict.fromkeys([*base, *("".join(merge) for merge in merges)])  # two merges may give one token
    vocab = {token: i for i, token in enumerate([*tokens, begin, end])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)  # type: ignore[arg-type]


def num_truncated(conditioner: Conditioner, captions: Iterable[str]) -> int:
    """Count the captions that are longer than the text encoder reads."""
    return sum(conditioner.num_tokens(caption) > conditioner.max_length for caption in captions)
