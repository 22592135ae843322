"""The cache of VAE moments and text context: every view of a picture and every caption of a set is encoded once.

Moments are kept, not samples of them: each step draws its own latents, so that the training distribution stays what it
would be without the cache. The null context is kept too, so that caption dropout stays per sample.

N pictures, V views of each, B batch, C latent channels, W H pixels, h w latents, L tokens, D width.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.conditioner import Conditioner
from ldm.data.ahead import ahead
from ldm.data.cache_folder import CacheFolder, Shard
from ldm.data.cache_layout import Layout
from ldm.data.cache_reader import CachedLatents
from ldm.data.pictures import Pictures
from ldm.errors import UserError
from ldm.nn.autoencoder import AutoencoderKL
from ldm.progress import Advance

FORMAT = 2
"""Of the files; a cache of another format has another key."""

DECODERS = min(8, os.cpu_count() or 1)
"""Threads that decode what is encoded next."""

BATCH_PIXELS = 2**22
"""Views are encoded in batches of no more pixels than this: 64 of 256x256, 16 of 512x512."""

LESS_SPACE = "free some, put it on another disk (output_dir=…), store less (data.cache_dtype=bf16) or data.cache=false"


def encoders_digest(vae: AutoencoderKL, conditioner: Conditioner) -> str:
    """Digest the weights and configs of both encoders and the tokenizer."""
    tokenizer = json.loads(conditioner.tokenizer.backend_tokenizer.to_str())
    tokenizer |= {"padding": conditioner.tokenizer.pad_token_id, "truncation": conditioner.max_length}
    settings = [tokenizer, vae.config, conditioner.text_tower.config]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for module in (vae, conditioner):
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_key(pictures: Pictures, layout: Layout, encoders: str) -> str:
    """Name a cache by all that decides its content: pictures and captions, transform, encoders, dtype, format."""
    parts = [FORMAT, pictures.source.fingerprint(), pictures.transform, layout.digest, encoders]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def cached_latents(
    root: Path,
    pictures: Pictures,
    vae: AutoencoderKL,
    conditioner: Conditioner,
    batch_size: int = 64,
    dtype: torch.dtype = torch.float32,
    memory: Literal["auto", "disk"] | torch.device = "auto",
    encoders: str | None = None,
    num_readers: int = 1,
) -> CachedLatents:
    """Open the cache of these pictures under `root`, built or finished first where it is not whole.

    Processes that come at the same time build it together. A damaged file is made again.

    Args:
        root: folder of all caches.
        pictures: pictures and captions, cut to size.
        vae, conditioner: encoders in eval mode, on the device to encode on.
        batch_size: of encoding, fewer where views are large.
        dtype: of what is stored; batches are float32.
        memory: see `CachedLatents`.
        encoders: `encoders_digest(vae, conditioner)`, where it is known already.
        num_readers: processes of this machine that open the cache, each with memory of its own.

    Raises:
        UserError: the disk is full, or cannot be written; a value is too large for `dtype`; a picture cannot be read.
    """
    layout = Layout(pictures, vae, conditioner, dtype)
    key = cache_key(pictures, layout, encoders or encoders_digest(vae, conditioner))
    folder = CacheFolder(root / key[:16], layout.shards, LESS_SPACE)
    if folder.missing:
        _build(folder, layout, pictures, vae, conditioner, batch_size)
    facts = {"format": FORMAT, "pictures": len(pictures), "views": pictures.num_variants, "captions": len(layout.texts)}
    folder.finish(facts)
    return CachedLatents(pictures, layout, folder, memory, num_readers)


# -------------------------------------------------------------------------------------------------------- encoding


def at_once(batch_size: int, width: int, height: int) -> int:
    """Return how many views of a size are encoded together, of a batch."""
    return min(batch_size, max(1, BATCH_PIXELS // (width * height)))


@torch.inference_mode()
def _build(
    folder: CacheFolder, layout: Layout, pictures: Pictures, vae: AutoencoderKL, conditioner: Conditioner, batch: int
) -> None:
    folder.check_space()
    started = time.monotonic()
    tables = {table.name: number for number, table in enumerate(layout.moments)}

    def context(shard: Shard, advance: Advance) -> Tensor:
        texts = layout.texts[shard.begin : shard.begin + shard.shape[0]]
        return _encode_captions(texts, conditioner, shard, batch, advance)

    def moments(shard: Shard, advance: Advance) -> Tensor:
        number = tables[shard.table]
        indices = layout.members[number][shard.begin : shard.begin + shard.shape[0]]
        width, height = layout.sizes[number]
        return _encode_pictures(pictures, indices, vae, shard, at_once(batch, width, height), advance)

    captions = folder.fill(layout.context.shards, context, "encoding captions", "captions")
    views = [shard for table in layout.moments for shard in table.shards]
    encoded = folder.fill(views, moments, "encoding pictures", "pictures")
    seconds = time.monotonic() - started
    print(f"  encoded {encoded} pictures and {captions} captions in {seconds:.0f} s: {folder.folder}", flush=True)


def _encode_captions(
    texts: Sequence[str], conditioner: Conditioner, shard: Shard, batch_size: int, advance: Advance
) -> Tensor:
    rows = torch.empty(shard.shape, dtype=shard.dtype)
    for begin in range(0, len(texts), batch_size):
        batch = texts[begin : begin + batch_size]
        rows[begin : begin + len(batch)] = _rounded(conditioner(batch), shard.dtype, [f"caption {t!r}" for t in batch])
        advance(len(batch))
    return rows


def _encode_pictures(
    pictures: Pictures, indices: NDArray[np.int64], vae: AutoencoderKL, shard: Shard, batch_size: int, advance: Advance
) -> Tensor:
    """Return (n, V, 2C, h, w). Batches begin with the shard: its bytes do not depend on where a build was cut."""
    weight = next(vae.parameters())
    rows = torch.empty(shard.shape, dtype=shard.dtype)
    batches = [indices[begin : begin + batch_size] for begin in range(0, len(indices), batch_size)]
    views = [(batch, variant) for batch in batches for variant in range(shard.shape[1])]
    done = 0
    for (batch, variant), image in zip(views, ahead(lambda view: pictures.images(*view), views, DECODERS), strict=True):
        moments = vae.encode(image.to(weight.device, weight.dtype, memory_format=torch.channels_last))
        told = [f"picture {i}" for i in batch]
        rows[done : done + len(batch), variant] = _rounded(moments, shard.dtype, told)
        if variant == shard.shape[1] - 1:
            done += len(batch)
            advance(len(batch))
    return rows


def _rounded(values: Tensor, dtype: torch.dtype, told: Sequence[str]) -> Tensor:
    """Return (B, …) in a cache's dtype, on the CPU; `told` says whose rows they are."""
    rounded = values.to(dtype)
    bad = ~rounded.flatten(1).isfinite().all(dim=1)
    if bad.any():
        i = int(bad.nonzero()[0])
        if values[i].isfinite().all():
            raise UserError(
                f"{told[i]} is encoded as values up to {values[i].abs().max():.3g}, beyond the range of "
                f"{str(dtype).removeprefix('torch.')}: data.cache_dtype=bf16 or fp32 holds them"
            )
        raise UserError(
            f"{told[i]} is encoded as values that are not finite: the weights of the VAE or the text encoder are "
            "damaged, or their precision is too low (float32 has the range)"
        )
    return rounded.cpu()
