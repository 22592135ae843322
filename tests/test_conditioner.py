import copy
import json
import logging
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import tiny
from ldm.conditioner import NULL_CAPTION, Conditioner, num_truncated, tokenize, train_tokenizer

LENGTH = tiny.TEXT["max_position_embeddings"]
TEXTS = [
    "",
    " ",
    "a red circle",
    "A RED\tcircle\n",
    "x" * 200,
    "日本 🙂 été",
    "e\u0301",
    "\u200b\u0000\x07",
    "don't; 12.5%",
]


# ------------------------------------------------------------------------------------------------------- tokenizer


def tied_captions() -> list[str]:
    """Captions in which thousands of pairs are equally frequent."""
    rng = random.Random(1)
    words = ["".join(rng.choice("abcdefghij") for _ in range(6)) for _ in range(1000)]
    return [" ".join(words[i : i + 5]) for i in range(0, 1000, 5)]


def test_the_vocabulary_is_the_same_in_every_process():
    code = (
        "from test_conditioner import tied_captions\n"
        "from ldm.conditioner import train_tokenizer\n"
        "print(train_tokenizer(tied_captions(), 900, 16).backend_tokenizer.to_str())"
    )
    tests = Path(__file__).parent
    env = {"PYTHONPATH": f"{tests}:{tests.parent / 'src'}"}
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120).stdout
    mine = [train_tokenizer(tied_captions(), 900, 16).backend_tokenizer.to_str() for _ in range(3)]
    assert {other.strip(), *mine} == {mine[0]}


def test_the_vocabulary_does_not_depend_on_the_order_of_captions():
    captions = tied_captions()
    one, other = train_tokenizer(captions, 900, 16), train_tokenizer(captions[::-1], 900, 16)
    assert one.get_vocab() == other.get_vocab()


def test_captions_make_words():
    assert decoded(train_tokenizer(tiny.CAPTIONS, 700, 16), "red circle 🙂") == ["red</w>", "circle</w>", "ðŁĻĤ</w>"]


@pytest.mark.parametrize("vocab_size", [514, 515, 520, 700, 10_000])
def test_the_vocabulary_is_no_larger_than_asked_for(vocab_size):
    tokenizer = train_tokenizer(tied_captions(), vocab_size, 16)
    assert len(tokenizer) <= vocab_size
    assert len(tokenizer) == vocab_size or vocab_size == 10_000
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id} == {len(tokenizer) - 2, len(tokenizer) - 1}


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size=513: bytes and special tokens alone are 514"):
        train_tokenizer(["a"], 513, 8)


@pytest.mark.parametrize("captions", [[], [""], ["a"], ["🙂"] * 3])
def test_few_captions_still_make_a_tokenizer(captions):
    assert "<|endoftext|>" not in decoded(train_tokenizer(captions, 600, 8), "any text at all")


def decoded(tokenizer, text) -> list[str]:
    """Return the tokens between begin and end."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, verbose=False)["input_ids"])
    assert tokens[0] == "<|startoftext|>" and tokens[-1] == "<|endoftext|>"
    return tokens[1:-1]


@settings(max_examples=300, deadline=None)
@given(st.text().filter(lambda text: "<|" not in text))
def test_no_text_is_unknown(text):
    tokenizer = tiny.tokenizer()
    assert tokenizer.unk_token not in decoded(tokenizer, text)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1))
def test_text_can_be_read_back(text):
    ids = tiny.tokenizer()(text)["input_ids"][1:-1]
    assert tiny.tokenizer().decode(ids).replace(" ", "") == text.lower().replace(" ", "")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(max_size=60).filter(lambda text: "<|" not in text), min_size=1, max_size=4))
def test_ids_are_begin_text_end_and_then_end_again(texts):
    tokenizer = tiny.tokenizer()
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    for text, row in zip(texts, tokenize(tokenizer, texts, LENGTH).tolist(), strict=True):
        whole = tokenizer(text, verbose=False)["input_ids"]
        assert len(row) == LENGTH and row[0] == begin
        if len(whole) <= LENGTH:
            assert row == whole + [end] * (LENGTH - len(whole))
        else:
            assert row == [*whole[: LENGTH - 1], end]


def test_composed_and_decomposed_letters_are_the_same():
    tokenizer = tiny.tokenizer()
    assert decoded(tokenizer, "Pok\u00e9mon") == decoded(tokenizer, "Poke\u0301mon") == decoded(tokenizer, " POKÉMON\n")


def test_saved_tokenizers_give_the_same_ids(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    expected = tokenize(tiny.tokenizer(), TEXTS, LENGTH)
    for kind in (CLIPTokenizer, AutoTokenizer):
        tokenizer = kind.from_pretrained(tmp_path)
        assert isinstance(tokenizer, CLIPTokenizer) and tokenizer.model_max_length == LENGTH
        assert torch.equal(tokenize(tokenizer, TEXTS, LENGTH), expected)
        assert len(tokenizer) == len(tiny.tokenizer())
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id) == (expected[0, 1], expected[0, 0])


def test_vocab_and_merges_files_give_the_same_ids(tmp_path):
    """Older releases write these two instead of tokenizer.json."""
    tiny.tokenizer().backend_tokenizer.model.save(str(tmp_path))
    old = CLIPTokenizer.from_pretrained(tmp_path)
    assert torch.equal(tokenize(old, TEXTS, LENGTH), tokenize(tiny.tokenizer(), TEXTS, LENGTH))


# --------------------------------------------------------------------------------------------------------- context


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_context_is_that_of_transformers(hidden_act):
    tower = tiny.text_tower(hidden_act=hidden_act)
    theirs = CLIPTextModel(CLIPTextConfig(**tower.config, bos_token_id=None)).eval()
    theirs.load_state_dict(tower.state_dict(), strict=True)
    conditioner = Conditioner(tiny.tokenizer(), tower)
    ids = tiny.tokenizer()(TEXTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    with torch.no_grad():
        found, expected = conditioner(TEXTS), theirs(ids["input_ids"])
    assert found.shape == (len(TEXTS), LENGTH, 16)
    torch.testing.assert_close(found, expected.last_hidden_state, rtol=0, atol=1e-5)


def test_each_caption_has_its_own_context_whatever_its_batch():
    conditioner = tiny.conditioner()
    with torch.no_grad():
        together = conditioner(tiny.CAPTIONS)
        alone = torch.cat([conditioner([caption]) for caption in tiny.CAPTIONS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_the_null_caption_is_the_empty_one():
    conditioner = tiny.conditioner()
    assert NULL_CAPTION == ""
    with torch.no_grad():
        null_context = conditioner.null_context()
        assert null_context.shape == (LENGTH, 16)
        assert torch.equal(null_context, conditioner([""])[0])
    begin, end = tiny.tokenizer().bos_token_id, tiny.tokenizer().eos_token_id
    assert conditioner.tokenize([NULL_CAPTION]).tolist() == [[begin] + [end] * (LENGTH - 1)]


def test_long_captions_are_cut_and_counted(monkeypatch):
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler])
    tokenizer = train_tokenizer(tiny.CAPTIONS, 560, LENGTH)  # a fresh one: each warns once only
    conditioner = Conditioner(tokenizer, tiny.text_tower())
    fits, long = "red " * (LENGTH - 2), "red " * (LENGTH - 1)
    assert (conditioner.num_tokens(fits), conditioner.num_tokens(long)) == (LENGTH, LENGTH + 1)
    assert num_truncated(conditioner, [fits, long, "", long]) == 2
    assert conditioner.tokenize([fits]).tolist() == conditioner.tokenize([long]).tolist()
    assert told == []


def test_the_shorter_of_tokenizer_and_tower_decides_the_length():
    for tokenizer_length, tower_length in ((8, 12), (12, 8)):
        tokenizer = train_tokenizer(tiny.CAPTIONS, 560, tokenizer_length)
        conditioner = Conditioner(tokenizer, tiny.text_tower(max_position_embeddings=tower_length))
        assert conditioner(["a red circle"]).shape == (1, 8, 16)


def test_a_vocabulary_larger_than_the_tower_is_refused():
    with pytest.raises(ValueError, match=r"the tokenizer has \d+ tokens, the text encoder embeds 100"):
        Conditioner(tiny.tokenizer(), tiny.text_tower(vocab_size=100, eos_token_id=99))


def test_context_follows_the_tower_in_precision_and_gradient():
    conditioner = tiny.conditioner()
    assert conditioner(["a"]).requires_grad
    assert conditioner.bfloat16()(["a"]).dtype == torch.bfloat16


def edited(folder: Path, file: str, edit) -> Any:
    """Return the tiny tokenizer with something else in one of its files."""
    tiny.tokenizer().save_pretrained(folder)
    content = json.loads((folder / file).read_text())
    edit(content)
    (folder / file).write_text(json.dumps(content))
    return CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("limit", ["77", True, 1, -3, 0])
def test_a_tokenizer_of_odd_length_is_refused(tmp_path, limit):
    tokenizer = edited(tmp_path, "tokenizer_config.json", lambda told: told.update(model_max_length=limit))
    with pytest.raises(ValueError, match=rf"model_max_length is {limit!r}, no number of tokens"):
        Conditioner(tokenizer, tiny.text_tower())


def test_a_token_beyond_the_embedding_is_refused(tmp_path):
    """However few there are: the ids need not go without a gap."""
    tokenizer = edited(tmp_path, "tokenizer.json", lambda told: told["model"]["vocab"].update({"a</w>": 5000}))
    with pytest.raises(ValueError, match="the tokenizer has 5001 tokens, the text encoder embeds"):
        Conditioner(tokenizer, tiny.text_tower())


def test_a_tokenizer_that_cannot_be_used_is_told(monkeypatch):
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="the tokenizer cannot be used: "):
        Conditioner(tokenizer, tiny.text_tower())
