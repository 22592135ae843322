"""The cache of VAE moments and text context: every picture and caption of a fixed set is encoded once.

Moments are kept, not samples of them: each step draws its own latents, so that the training distribution stays what it
would be without the cache. The null context is kept too, so that caption dropout stays per sample.

A cache is a folder of safetensors shards, each written to a temporary name and renamed, and a manifest written last.
A folder without a manifest is a build that was interrupted: its whole shards are kept and the rest is added.

B batch, C latent channels, h w latents, L tokens, D width.
"""

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from ldm.conditioner import Conditioner
from ldm.data.datamodule import Pictures
from ldm.nn.autoencoder import AutoencoderKL

MANIFEST = "manifest.json"
NULL_CONTEXT = "null.safetensors"
SHARD_SIZE = 4096


class CachedLatents(Dataset[dict[str, Tensor]]):
    """A cache, read by memory map; a batch is {"moments": (B, 2C, h, w), "context": (B, L, D)}."""

    def __init__(self, folder: Path) -> None:
        self.shards = [load_file(path) for path in sorted(folder.glob("shard-*.safetensors"))]
        self.null_context = load_file(folder / NULL_CONTEXT)["context"]

    def __len__(self) -> int:
        return sum(len(shard["moments"]) for shard in self.shards)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        places = [divmod(i, SHARD_SIZE) for i in indices]
        return {
            key: torch.stack([self.shards[shard][key][row] for shard, row in places]) for key in ("moments", "context")
        }


def cache_key(pictures: Pictures, vae: AutoencoderKL, conditioner: Conditioner) -> str:
    """Name a cache by all that decides its content: pictures and captions, transform, tokenizer, both encoders."""
    tokenizer = json.loads(conditioner.tokenizer.backend_tokenizer.to_str())
    tokenizer |= {"padding": conditioner.tokenizer.pad_token_id, "truncation": conditioner.max_length}
    settings = [tokenizer, vae.config, conditioner.text_tower.config]
    digest = hashlib.sha256(f"{pictures.source.fingerprint()} {pictures.resolution} {SHARD_SIZE}".encode())
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for module in (vae, conditioner):
        for name, tensor in module.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cached_latents(
    root: Path, pictures: Pictures, vae: AutoencoderKL, conditioner: Conditioner, batch_size: int = 64
) -> CachedLatents:
    """Open the cache of these pictures under `root`, built or finished first where it is not whole.

    Processes that come at the same time wait for the one that builds. A damaged shard is built again.

    Args:
        root: folder of all caches.
        pictures: pictures and captions, cut to size.
        vae, conditioner: encoders in eval mode, on the device to encode on.
        batch_size: of encoding.
    """
    folder = root / cache_key(pictures, vae, conditioner)[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if (folder / MANIFEST).exists():
            digests = _read_manifest(folder)
            damaged = [name for name in _file_names(len(pictures)) if _digest(folder / name) != digests.get(name)]
            # The manifest goes last: whenever this is cut short, what is damaged is found again.
            for name in [*damaged, MANIFEST] if damaged else ():
                (folder / name).unlink(missing_ok=True)
        if not (folder / MANIFEST).exists():
            _build(folder, pictures, vae, conditioner, batch_size)
        return CachedLatents(folder)


@torch.inference_mode()
def _build(folder: Path, pictures: Pictures, vae: AutoencoderKL, conditioner: Conditioner, batch_size: int) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    device = next(vae.parameters()).device
    starts = range(0, len(pictures), SHARD_SIZE)
    *names, null_context = _file_names(len(pictures))
    _save(folder / null_context, {"context": conditioner.null_context()[None]})
    columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    started = time.monotonic()
    with Progress(*columns, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("encoding pictures and captions", total=len(pictures))
        for start, name in zip(starts, names, strict=True):
            stop = min(start + SHARD_SIZE, len(pictures))
            if _whole_shard(folder / name, stop - start):
                progress.advance(task, stop - start)
                continue
            moments, context = [], []
            for i in range(start, stop, batch_size):
                batch = pictures.__getitems__(list(range(i, min(i + batch_size, stop))))
                image = batch["image"].to(device, memory_format=torch.channels_last)
                moments.append(vae.encode(image).float().cpu())
                context.append(conditioner(batch["caption"]).float().cpu())
                progress.advance(task, len(batch["caption"]))
            _save(folder / name, {"moments": torch.cat(moments).contiguous(), "context": torch.cat(context)})
    seconds = time.monotonic() - started
    print(f"  encoded {len(pictures)} pictures and captions in {seconds:.0f} s: {folder}", flush=True)
    digests = {name: _digest(folder / name) for name in (*names, null_context)}
    temporary = folder / "manifest.tmp"
    temporary.write_text(json.dumps(digests, indent=1), encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)


def _file_names(num_samples: int) -> list[str]:
    return [*(f"shard-{i:05d}.safetensors" for i in range(-(-num_samples // SHARD_SIZE))), NULL_CONTEXT]


def _whole_shard(path: Path, num_samples: int) -> bool:
    """Tell whether an interrupted build left this shard whole: a rename puts it in place, so being readable will do."""
    try:
        return path.exists() and len(load_file(path)["moments"]) == num_samples
    except (SafetensorError, KeyError):
        return False


def _read_manifest(folder: Path) -> Mapping[str, str]:
    """Return the digest of each file, or none where the manifest itself is damaged."""
    try:
        digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return digests if isinstance(digests, dict) else {}


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, path)


def _digest(path: Path) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file closes, also when the process dies
        yield
