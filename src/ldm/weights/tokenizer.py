"""The tokenizer of a text encoder: found, loaded, and packed into texts that a single file carries."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.files import load_json
from ldm.nn.clip import TextTower
from ldm.weights.archive import Archive, read_archive
from ldm.weights.hub import TOKENIZER_FILES, fetch, find_part, part_folder

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # that of every Stable Diffusion 1.x and 2.x
WANTED = "(tokenizer.json, or vocab.json and merges.txt)"


def load_tokenizer(folder: Path, **options: Any) -> Any:
    """Load a `transformers.CLIPTokenizer` from `tokenizer.json`, or from `vocab.json` and `merges.txt`.

    Args:
        folder: that holds them.
        options: that go before those of its `tokenizer_config.json`.

    Raises:
        UserError: neither is there, or they are damaged.
    """
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        # Left to itself, transformers would make one up that knows two words.
        raise UserError(f"{folder} holds no tokenizer {WANTED}")
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:
        raise UserError(f"{folder} holds no CLIP tokenizer: {error}") from error
    for name in ("is_local", "local_files_only"):  # of this call, which would be saved with the tokenizer
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def find_tokenizer(
    base: Archive | Path,
    text_tower: TextTower,
    tokenizer: str | None = None,
    text_encoder: str | None = None,
    option: str = "tokenizer",
) -> Any:
    """Load the tokenizer that was named, that of the text encoder that was named, or the model's own.

    Args:
        base: the model: its file, or its folder.
        text_tower: that is to read the tokens.
        tokenizer, text_encoder: sources, None where nothing was named.
        option: how the user gives a tokenizer for a file without one, for messages.

    Raises:
        UserError: a tokenizer that was named, or that of a folder, is not there or is damaged; or a file has none, and
            CLIP's cannot be had.
    """
    options: dict[str, Any] = {}
    if isinstance(base, Archive) and not base.told and is_open_clip(text_tower):
        options["pad_token"] = "!"  # id 0, as OpenCLIP pads; CLIP's own pads with the end of text
    if tokenizer:
        found = _from_source(tokenizer, "tokenizer", options)
        if found is None:
            raise UserError(f"tokenizer={tokenizer} holds no tokenizer {WANTED}")
        return found
    if text_encoder and (found := _from_source(text_encoder, "text_encoder", options)):
        return found
    if isinstance(base, Path):
        return load_tokenizer(part_folder(base, "tokenizer") or base / "tokenizer")
    if "tokenizer" in base.told:
        return _unpacked(base.told["tokenizer"], base.path)
    try:
        return load_tokenizer(find_part(CLIP_TOKENIZER, "tokenizer", option=option), **options)
    except UserError as error:
        raise UserError(f"{base.path} holds no tokenizer, and {error}") from None


def load_text_tokenizer(source: str, text_tower: TextTower, option: str) -> Any:
    """Load the tokenizer that goes with a text encoder which was loaded from `source`.

    Raises:
        UserError: as `find_tokenizer`.
    """
    path = fetch(source, ("tokenizer",), option)
    return find_tokenizer(read_archive(path) if path.is_file() else path, text_tower, option=option)


def is_open_clip(text_tower: TextTower) -> bool:
    """Tell the text encoder of Stable Diffusion 2.x, which is OpenCLIP's, from that of 1.x."""
    return text_tower.config["hidden_act"] == "gelu"


def tokenizer_files(tokenizer: Any) -> dict[str, str]:
    """Return the texts of the files that a tokenizer is saved as, without needless space."""
    texts = {}
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in (Path(folder) / name for name in TOKENIZER_FILES):
            if file.suffix == ".json" and file.is_file():
                texts[file.name] = json.dumps(load_json(file), ensure_ascii=False, separators=(",", ":"))
            elif file.is_file():
                texts[file.name] = file.read_text(encoding="utf-8")
    return texts


def _from_source(source: str, option: str, options: Mapping[str, Any]) -> Any:
    path = fetch(source, ("tokenizer",), option)
    if path.is_file():
        told = read_archive(path).told
        return _unpacked(told["tokenizer"], path) if "tokenizer" in told else None
    folder = part_folder(path, "tokenizer")
    return load_tokenizer(folder, **options) if folder else None


def _unpacked(files: Mapping[str, Any], path: Path) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        for name in TOKENIZER_FILES:
            if isinstance(text := files.get(name), str):
                (Path(folder) / name).write_text(text, encoding="utf-8", errors="replace")
        try:
            return load_tokenizer(Path(folder))
        except UserError as error:
            raise UserError(f"{path}: its metadata (tokenizer): {error}") from None
