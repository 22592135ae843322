"""Where weights come from: run directories, model folders, single files, the Hugging Face hub. Nothing imports torch.

What a person names is a `source`: any of these. A local path wins over a hub id.
"""

import os
import re
from collections.abc import Collection, Iterator
from itertools import product
from pathlib import Path

from ldm.errors import UserError
from ldm.files import WEIGHT_SUFFIXES, load_json

INDEX = "model_index.json"
SETTINGS = "ldm.json"  # beside it: what `sample.py` does unless told otherwise; other tools pass it over
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
FALLBACK = "fp16"  # the one variant that some repositories hold alone


def check_source(source: str, option: str = "ckpt") -> None:
    """Know at the door whether a source may be a model; what is in it shows when it is loaded.

    Args:
        source: as given; a hub id passes unseen.
        option: how the user gives it, for messages.

    Raises:
        UserError: it is not there, or is something else.
    """
    if (path := locate(source, option)) is None:
        return
    if path.is_dir():
        model_folder(path, f"{option}={source}")
    elif path.suffix not in WEIGHT_SUFFIXES:
        raise UserError(
            f"{option}={source} is a file of another kind: name a run directory, a model folder (with {INDEX}), a hub "
            f"id, or a file of weights ({', '.join(WEIGHT_SUFFIXES)})"
        )


def locate(source: str, option: str) -> Path | None:
    """Return the file or folder that a source names; None where it is a hub id.

    Raises:
        UserError: it is neither.
    """
    path = Path(os.path.expanduser(source))
    if source and os.path.exists(path):  # also of what is too long for a name
        return path
    if source.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source, re.ASCII):
        raise UserError(f"{option}={source}: there is no such folder or file (seen from {Path.cwd()})")
    if path.suffix in WEIGHT_SUFFIXES:
        raise UserError(f"{option}={source}: there is no such file (seen from {Path.cwd()})")
    return None


def find_model(source: str, option: str = "ckpt") -> Path:
    """Return the model folder that a local source names: the folder itself, or `model/` in a run directory.

    Raises:
        UserError: it is not there, or is of another kind.
    """
    path = Path(os.path.expanduser(source))
    if not os.path.exists(path):
        raise UserError(f"{option}={source}: there is no such folder (seen from {Path.cwd()})")
    return model_folder(path, f"{option}={source}")


def model_folder(path: Path, told: str) -> Path:
    """Return the model folder that a path is or holds; raise a UserError that begins with `told` where it does not."""
    for folder in (path, path / "model"):
        if (folder / INDEX).is_file():
            return folder
    if path.is_file():
        raise UserError(f"{told} is a file; name a run directory or a model folder (with {INDEX})")
    if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        raise UserError(f"{told}: this run has no finished model yet; `python train.py` with its config goes on")
    if (path / "config.json").is_file():
        raise UserError(f"{told} is a single network, not a whole model (no {INDEX})")
    raise UserError(f"{told} is neither a run directory nor a model folder (no {INDEX})")


def fetch(source: str, parts: Collection[str], option: str, variant: str | None = None) -> Path:
    """Return the file or folder that a source names, downloaded from the hub where it has to be.

    Args:
        source: as given.
        parts: what of a hub repository is wanted.
        option: how the user gives it, for messages.
        variant: of the weights' files.

    Raises:
        UserError: it cannot be had; says how to use a mirror or a local folder.
    """
    return locate(source, option) or download(source, parts, option, variant)


def find_part(source: str, part: str, variant: str | None = None, option: str | None = None) -> Path:
    """Return the folder of one part of a model, or the single file that holds it.

    Args:
        source: `./vae`, `outputs/run`, `vae.safetensors`, or a hub id such as `stabilityai/sd-vae-ft-mse`.
        part: `unet`, `vae`, `text_encoder`, `clip`, `tokenizer` or `scheduler`.
        variant: of the weights' files.
        option: how the user gives the source, for messages; None for `part`.

    Raises:
        UserError: it cannot be had, or holds no such part.
    """
    root = fetch(source, (part,), option or part, variant)
    if root.is_file():
        return root
    if folder := part_folder(root, part):
        return folder
    raise UserError(f"{option or part}={source} holds no {part} in diffusers' or transformers' format")


def part_folder(root: Path, part: str) -> Path | None:
    """Return where a folder holds a part: under its name, in a run directory under `model/` too, or by itself."""
    signs = {"tokenizer": ("tokenizer.json", "vocab.json"), "scheduler": ("scheduler_config.json",)}
    for folder in (root / part, root / "model" / part, root):
        if any((folder / name).is_file() for name in signs.get(part, ("config.json",))):
            return folder
    return None


def weight_files(folder: Path, variant: str | None = None) -> tuple[list[Path], str | None]:
    """Return the files that hold the weights of a network's folder: one, or the shards that an index names.

    Safetensors come before pickles. Where the variant is not there the weights without one are taken, where fp16 is
    there alone that.

    Returns:
        The files, and the variant that they are.

    Raises:
        UserError: there are none, or the index is damaged or names files elsewhere.
    """
    for form, ending in _forms(variant):
        dot_form = f".{form}" if form else ""
        for stem in STEMS:
            single = f"{stem}{dot_form}.{ending}"
            indices = f"{stem}.{ending}.index{dot_form}.json", f"{single}.index.json"  # by newer and by older tools
            if (folder / single).is_file():
                return [folder / single], form
            for index in indices:
                if (folder / index).is_file():
                    return _shards(folder / index), form
    raise UserError(f"{folder} holds no weights ({', '.join(f'{stem}.safetensors' for stem in STEMS[:2])})")


def _forms(variant: str | None) -> Iterator[tuple[str | None, str]]:
    """Give the variants and endings that may serve, best first."""
    for form in (variant, None if variant else FALLBACK):
        yield from ((form, ending) for ending in ("safetensors", "bin"))


def _shards(index: Path) -> list[Path]:
    shards = load_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index} names no files (weight_map)")
    names = {str(name) for name in shards.values()}
    if outside := sorted(name for name in names if Path(name).name != name or Path(name).suffix not in WEIGHT_SUFFIXES):
        raise UserError(f"{index} names {outside[0]!r}, which is no file of weights beside it")
    return [index.parent / name for name in sorted(names)]


def download(repo_id: str, parts: Collection[str], option: str, variant: str | None = None) -> Path:
    """Bring the wanted parts of a hub repository into the hub's cache; return its folder there.

    The small files come first and tell what there is; then, of each network, the best form of its weights alone.

    Raises:
        UserError: it cannot be had.
    """
    names = (INDEX, SETTINGS, "config.json", "scheduler_config.json", *TOKENIZER_FILES, "*.index*.json")
    patterns = [f"{folder}{name}" for folder in ("", *(f"{part}/" for part in parts)) for name in names]
    root = _snapshot(repo_id, patterns, option)
    folders = [part_folder(root, part) for part in parts if part not in ("tokenizer", "scheduler")]
    lacking, tried = [folder.relative_to(root) for folder in folders if folder], set()
    for form, ending in _forms(variant):
        if not lacking:
            break
        dot_form = f".{form}" if form else ""
        tried.add((form, f".{ending}"))
        for folder, stem in product(lacking, STEMS):
            for name in (f"{stem}{dot_form}", f"{stem}{dot_form}-*-of-?????", f"{stem}-*-of-?????{dot_form}"):
                patterns.append((folder / f"{name}.{ending}").as_posix())
        root = _snapshot(repo_id, patterns, option)
        lacking = [folder for folder in lacking if not _has_weights(root / folder, variant, tried)]
    return root


def _has_weights(folder: Path, variant: str | None, forms: Collection[tuple[str | None, str]]) -> bool:
    """Tell whether the weights that would be taken are all there, and are not what an earlier download left."""
    try:
        files, form = weight_files(folder, variant)
    except UserError:
        return False
    return (form, files[0].suffix) in forms and all(file.is_file() for file in files)


def _snapshot(repo_id: str, patterns: Collection[str], option: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(patterns)))
    except Exception as error:  # no network, no such repository, no permission: for the user one and the same
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{option}={repo_id} is no local folder and cannot be had from the hub: {reason}; name a mirror "
            f"({option}=<other/id>) or a local folder ({option}=./folder)"
        ) from error
