import pickle
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.captions import Wording, clean, says_side
from ldm.errors import UserError

TEXTS = st.text(st.characters(exclude_categories=()))  # halves of characters, too


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a\tred\r\n house\u2028\u00a0here ", "a red house here"),
        ("a\x00b\x07c\x7fd\x9be", "abcde"),
        ("cafe\u0301", "café"),
        ("e\x00\u0301", "é"),  # in NFC, although it was a control character that parted them
        ("\ufeffa soft\u00adware\u200b\u202e", "a software"),
        ("half \udce9 \ud83d character", "half character"),
        ("👩\u200d🚀 می\u200cخواهم", "👩\u200d🚀 می\u200cخواهم"),  # joiners belong to what they join
        ("\x00\n\u200b", ""),
    ],
)
def test_clean(text, cleaned):
    assert clean(text) == cleaned


@given(TEXTS)
def test_a_clean_caption_is_one_line_of_composed_text_and_stays_as_it_is(text):
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    assert unicodedata.is_normalized("NFC", cleaned)
    assert not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in cleaned)
    assert cleaned == " ".join(cleaned.split())


def test_a_template_takes_fields_of_the_row_and_a_caption_at_a_time():
    word = Wording("{caption}, by {the artist}{{{year}}}", prefix="a photo of ", suffix=" (old)")
    row = {"the artist": " Ann\nLee", "year": 1907, "caption": "not this"}
    assert word(row, ["a cat", "a  dog"]) == [
        "a photo of a cat, by Ann Lee{1907} (old)",
        "a photo of a dog, by Ann Lee{1907} (old)",
    ]


@pytest.mark.parametrize(
    ("value", "said"), [(["red", "round"], "red, round"), (None, ""), (1.5, "1.5"), (True, "True"), ([], "")]
)
def test_what_a_field_may_hold(value, said):
    assert Wording("{caption}: {tags}.")({"tags": value}, ["x"]) == [f"x: {said}."]


def test_a_field_that_holds_no_text_is_named():
    with pytest.raises(UserError, match=r"\{tags\}, which holds dict"):
        Wording("{caption} {tags}")({"tags": {}}, ["x"])


@pytest.mark.parametrize("caption", ["", " \n", "\x00"])
def test_no_caption_stays_none(caption):
    assert Wording("{caption}, art", "a ", " !")({}, [caption, "cat"]) == ["", "a cat, art !"]


@given(TEXTS, TEXTS)
def test_nothing_in_the_data_is_interpreted(caption, field):
    said = Wording("{caption}|{field}")({"field": field}, [caption])
    assert said == [clean(f"{clean(caption)}|{clean(field)}") if clean(caption) else ""]


@pytest.mark.parametrize("data", ["{caption}", "{0.__class__}", "{field!r:>{width}}", "%s {{}} \\n"])
def test_braces_in_the_data_stay(data):
    assert Wording("{caption} {field}")({"field": data}, [data]) == [f"{data} {data}"]


@pytest.mark.parametrize(
    "template",
    ["{caption} {}", "{caption.__class__}", "{caption[0]}", "{caption!r}", "{caption:>10}", "{caption} {a:{b}}"],
)
def test_only_plain_names_stand_in_braces(template):
    with pytest.raises(UserError, match="plain name"):
        Wording(template)


@pytest.mark.parametrize("template", ["{caption", "{caption} }", "{caption} {"])
def test_a_template_that_cannot_be_read(template):
    with pytest.raises(UserError, match=r"data\.caption_template=.* cannot be read"):
        Wording(template)


@pytest.mark.parametrize("template", ["", "a picture", "{text}", "{{caption}}"])
def test_a_template_without_the_caption_is_refused(template):
    with pytest.raises(UserError, match=r"no \{caption\}"):
        Wording(template)


def test_an_unknown_field_is_named_with_those_there_are():
    with pytest.raises(UserError, match=r"\{artist\}, which is not there; there are: caption, file_name, tags"):
        Wording("{caption} {artist}")({"file_name": "a", "tags": "b"}, ["x"])


def test_wording_reaches_loader_processes():
    word = pickle.loads(pickle.dumps(Wording("{caption}!", "the ")))
    assert word({}, ["cat"]) == ["the cat!"]


@pytest.mark.parametrize(
    ("caption", "said"),
    [
        ("a dog on the left", True),
        ("Left-handed", True),
        ("the RIGHT side", True),
        ("leftmost", True),
        ("facing rightwards.", True),
        ("left_side", True),
        ("his right's", True),
        ("leftover rice, bright and upright", False),
        ("copyright, rights, righteous", False),
        ("", False),
    ],
)
def test_left_and_right_are_seen_as_words(caption, said):
    assert says_side(caption) is said
