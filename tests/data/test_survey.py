import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm.data.survey import NEAR, near_pairs, survey_captions, survey_duplicates, survey_sizes


def sizes_of(*pairs):
    return np.array(pairs, np.int32)


def names(num):
    return [f"{i}.png" for i in range(num)]


def by_topic(findings, topic):
    return [finding for finding in findings if finding.topic == topic]


# ----------------------------------------------------------------------------------------------------------- sizes


def test_pictures_that_fit_are_only_described():
    findings = survey_sizes(sizes_of((64, 64), (128, 128)), sizes_of((64, 64), (64, 64)), names(2), bucketed=False)
    assert {finding.level for finding in findings} == {"note"}
    text = " ".join(finding.text for finding in findings)
    assert "64 to 128 px wide" in text and "100% are square" in text and "loses 0.0%" in text


def test_what_is_cut_is_told_with_the_worst_and_the_way_out():
    sizes, views = sizes_of((128, 64), (64, 64)), sizes_of((64, 64), (64, 64))
    [cut] = by_topic(survey_sizes(sizes, views, names(2), bucketed=False), "cut")
    assert cut.level == "warning" and "25.0%" in cut.text and "50% (0.png)" in cut.text
    assert "data.buckets=true" in cut.text
    [cut] = by_topic(survey_sizes(sizes, views, names(2), bucketed=True), "cut")
    assert "data.buckets" not in cut.text


def test_pictures_smaller_than_the_model_sees_are_told():
    findings = survey_sizes(sizes_of((32, 20), (64, 64), (9, 70)), sizes_of(*[(64, 64)] * 3), names(3), False)
    [small] = by_topic(findings, "enlarged")
    assert small.level == "warning" and small.text.startswith("2 pictures (67%)") and "2.png (9×70)" in small.text
    assert "1 pictures have a side under 16 px: 2.png" in by_topic(findings, "sizes")[1].text


# ------------------------------------------------------------------------------------------------------- duplicates


def test_no_duplicates():
    hashes = np.random.default_rng(0).integers(0, 2**64, 100, dtype=np.uint64)
    [finding] = survey_duplicates([f"{i}" for i in range(100)], hashes, names(100))
    assert finding == ("duplicates", "none", "note")


def test_copies_and_look_alikes_are_named():
    hashes = np.random.default_rng(0).integers(0, 2**64, 6, dtype=np.uint64)
    hashes[4] = hashes[1] ^ np.uint64(0b101)
    hashes[5] = hashes[0]
    copies, alike = survey_duplicates(["a", "b", "c", "d", "e", "a"], hashes, names(6))
    assert copies.text == "1 pictures are exact copies: 0.png = 5.png" and copies.level == "warning"
    assert alike.text == "2 pictures look nearly the same as another: 1.png = 4.png"


@given(st.lists(st.integers(0, 2**64 - 1), max_size=40), st.integers(0, 2**64 - 1))
def test_near_pairs_are_those_within_some_bits(hashes, flips):
    hashes += [number ^ (flips & (1 << i % 64)) for i, number in enumerate(hashes)]
    told = [number for number in hashes if 8 <= number.bit_count() <= 56]
    places = [i for i, number in enumerate(hashes) if 8 <= number.bit_count() <= 56]
    brute = [
        (places[a], places[b])
        for a in range(len(told))
        for b in range(a + 1, len(told))
        if (told[a] ^ told[b]).bit_count() <= NEAR
    ]
    assert near_pairs(np.array(hashes, np.uint64)) == brute


def test_many_pictures_are_compared_in_blocks():
    hashes = np.random.default_rng(0).integers(0, 2**64, 2000, dtype=np.uint64)
    hashes[1999] = hashes[3]
    assert near_pairs(hashes) == [(3, 1999)]


# --------------------------------------------------------------------------------------------------------- captions


def captions_of(texts, max_tokens=5, max_bad=0.01):
    captions = [[text] if isinstance(text, str) else text for text in texts]
    return survey_captions(captions, names(len(texts)), lambda text: len(text.split()), max_tokens, max_bad)


def test_good_captions_are_counted():
    [finding] = captions_of([["a cat", "a dog"], "a house", "a cat"])
    assert finding.text == "4 for 3 pictures, 3 different; 1 pictures have several" and finding.level == "note"


@pytest.mark.parametrize(("max_bad", "level"), [(0.01, "ruin"), (0.5, "warning")])
def test_missing_captions_are_named(max_bad, level):
    _, empty = captions_of(["a", "", "c", "d"], max_bad=max_bad)
    assert empty.text == "1 pictures (25.0%) have none: 1.png" and empty.level == level


def test_repeated_captions():
    _, same = captions_of(["a photo"] * 5 + ["b", "c", "d"])
    assert same.text == "5 (62%) are the same: 'a photo'" and same.level == "warning"
    assert captions_of(["a photo"] * 20)[1].level == "ruin"


def test_long_captions_are_counted_and_shown():
    long = "one two three four five six " + "x" * 80
    _, cut = captions_of([long, "b", long])
    assert cut.text.startswith("2 (66.7%) are longer than 5 tokens and are cut: 'one two") and "… (7)"[1:] in cut.text
    assert long not in cut.text and cut.level == "warning"


def test_no_captions_at_all():
    assert [finding.level for finding in captions_of(["", ""])] == ["note", "ruin"]
