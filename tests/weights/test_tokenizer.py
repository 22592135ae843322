"""Tokenizers: either form, whose they are, and what pads."""

import json
import shutil
from pathlib import Path

import pytest

import tiny
from ldm.conditioner import train_tokenizer
from ldm.errors import UserError
from ldm.weights.folder import save_network
from ldm.weights.tokenizer import load_text_tokenizer, load_tokenizer, tokenizer_files

TEXTS = ["a large red circle!", "ein Pokémon 🙂, 日本", "", "a " * 30]


def ids(tokenizer) -> list[list[int]]:
    return tokenizer(TEXTS, padding="max_length", truncation=True, max_length=12)["input_ids"]


def write_old_form(folder: Path, **config) -> Path:
    """Write vocab.json and merges.txt, as published models have them."""
    folder.mkdir()
    tiny.tokenizer().backend_tokenizer.model.save(str(folder))
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 12,
        "pad_token": "<|endoftext|>",
        **names,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_tokenizers_are_loaded_from_either_form(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path / "new")
    for folder in (tmp_path / "new", write_old_form(tmp_path / "old")):
        assert ids(load_tokenizer(folder)) == ids(tiny.tokenizer())


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    save_network(tiny.text_tower(), tmp_path / "text_encoder")
    for folder in (tmp_path, tmp_path / "text_encoder"):
        with pytest.raises(UserError, match="holds no tokenizer"):
            load_tokenizer(folder)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"model": {}}'])
def test_damaged_tokenizers(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="holds no CLIP tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_saved_again_is_the_same_file(tmp_path):
    train_tokenizer(tiny.CAPTIONS, 560, 12).save_pretrained(tmp_path / "a")  # one that was used keeps traces
    load_tokenizer(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()


def test_the_texts_of_a_tokenizer_are_those_of_its_files(tmp_path):
    files = tokenizer_files(tiny.tokenizer())
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert ids(load_tokenizer(tmp_path)) == ids(tiny.tokenizer())


def test_the_padding_of_stable_diffusion_2_is_that_of_its_own_tokenizer(tmp_path):
    """Its published tokenizer is CLIP's with `pad_token` "!"; so is ours, made of CLIP's, and what is saved of it."""
    published = load_tokenizer(write_old_form(tmp_path / "published", pad_token="!"))
    assert published.pad_token_id == 0 != load_tokenizer(write_old_form(tmp_path / "clip")).pad_token_id
    ours = load_tokenizer(tmp_path / "clip", pad_token="!")
    ours.save_pretrained(tmp_path / "ours")
    shutil.rmtree(tmp_path / "clip")
    assert ids(published) == ids(ours) == ids(load_tokenizer(tmp_path / "ours"))


def test_a_text_encoder_without_its_tokenizer_is_refused(tmp_path):
    save_network(tiny.text_tower(), tmp_path / "text_encoder")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_text_tokenizer(str(tmp_path), tiny.text_tower(), "text_encoder.pretrained")
