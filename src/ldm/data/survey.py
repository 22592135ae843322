"""What is good and bad about a set of captioned pictures, in findings that a person reads.

N pictures, W H pixels.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldm.data.buckets import crop_loss

Level = Literal["note", "warning", "ruin"]
NEAR = 3  # bits in 64 by which the difference hashes of near duplicates differ at most
MOST_COMPARED = 40_000  # all pairs of more take minutes


class Finding(NamedTuple):
    """One line of a report; a `ruin` is what would make training useless or end it."""

    topic: str
    text: str
    level: Level = "note"


def survey_sizes(
    sizes: NDArray[np.int32], view_sizes: NDArray[np.int32], names: Sequence[str], bucketed: bool
) -> list[Finding]:
    """Tell how large the pictures are, of what shape, and how much of them is cut away or made up.

    Args:
        sizes: (N, 2) of the pictures.
        view_sizes: (N, 2) as the model sees them.
        names: what a person calls them.
        bucketed: whether shapes are kept by buckets already.
    """
    sides, ratios = sizes.min(1), sizes[:, 0] / sizes[:, 1]
    (w_low, h_low), (w_high, h_high) = sizes.min(0), sizes.max(0)
    median = np.median(sizes, axis=0).astype(int)
    findings = [
        Finding("sizes", f"{w_low} to {w_high} px wide, {h_low} to {h_high} px high, median {median[0]}×{median[1]}"),
        Finding("shapes", f"aspect ratios {ratios.min():.2f} to {ratios.max():.2f}, median {np.median(ratios):.2f}; "
                f"{np.mean(sizes[:, 0] == sizes[:, 1]):.0%} are square"),
    ]  # fmt: skip
    lost = crop_loss(sizes, view_sizes)
    worst = int(lost.argmax())
    text = f"scaling to cover and cutting loses {lost.mean():.1%} of the pixels, at worst {lost[worst]:.0%}"
    text += f" ({names[worst]})" if lost[worst] > 0 else ""
    if lost.mean() > 0.1 and not bucketed:
        text += "; data.buckets=true keeps shapes"
    findings.append(Finding("cut", text, "warning" if lost.mean() > 0.1 else "note"))
    scale = (view_sizes / sizes).max(1)
    small = scale > 1
    if small.any():
        share = small.mean()
        width, height = sizes[smallest := int(scale.argmax())]
        text = (
            f"{small.sum()} pictures ({share:.0%}) are smaller than they will be trained at, up to {scale.max():.1f}×: "
            f"{names[smallest]} ({width}×{height})"
        )
        findings.append(Finding("enlarged", text, "warning" if share > 0.05 else "note"))
    if sides.min() < 16:
        tiny = int(sides.argmin())
        findings.append(
            Finding("sizes", f"{(sides < 16).sum()} pictures have a side under 16 px: {names[tiny]}", "warning")
        )
    return findings


def survey_duplicates(digests: Sequence[str], likenesses: NDArray[np.uint64], names: Sequence[str]) -> list[Finding]:
    """Tell which pictures are there more than once: the same file, or one that looks nearly the same."""
    findings = []
    groups: dict[str, list[int]] = {}
    for i, digest in enumerate(digests):
        groups.setdefault(digest, []).append(i)
    same = [group for group in groups.values() if len(group) > 1]
    if same:
        extra = sum(len(group) for group in same) - len(same)
        findings.append(
            Finding("duplicates", f"{extra} pictures are exact copies: {_examples(same, names)}",
                    "warning" if extra > 0.01 * len(digests) else "note")
        )  # fmt: skip
    firsts = np.array([group[0] for group in groups.values()])
    pairs = near_pairs(likenesses[firsts])
    if pairs:
        several = [(int(firsts[a]), int(firsts[b])) for a, b in pairs]
        involved = len({i for pair in several for i in pair})
        level: Level = "warning" if involved > 0.05 * len(digests) else "note"
        findings.append(Finding("look-alikes", f"{involved} pictures look nearly the same as another: "
                                f"{_examples(several, names)}", level))  # fmt: skip
    if not findings:
        findings.append(Finding("duplicates", "none"))
    return findings


def near_pairs(likenesses: NDArray[np.uint64]) -> list[tuple[int, int]]:
    """Return the pairs i < j whose hashes differ in at most NEAR bits.

    Pictures that are nearly blank say nothing by their hash and are passed over; of more than MOST_COMPARED pictures,
    so many, spread evenly, are compared.
    """
    chosen = np.flatnonzero((np.bitwise_count(likenesses) >= 8) & (np.bitwise_count(~likenesses) >= 8))
    if len(chosen) > MOST_COMPARED:
        chosen = chosen[np.linspace(0, len(chosen) - 1, MOST_COMPARED).astype(int)]
    hashes = likenesses[chosen]
    pairs = []
    for start in range(0, len(hashes), 512):
        rows = hashes[start : start + 512]
        near = np.bitwise_count(rows[:, None] ^ hashes[None, start:]) <= NEAR
        for a, b in np.argwhere(np.triu(near, 1)):
            pairs.append((int(chosen[start + a]), int(chosen[start + b])))
    return pairs


def survey_captions(
    captions: Sequence[Sequence[str]],
    names: Sequence[str],
    num_tokens: Callable[[str], int],
    max_tokens: int,
    max_bad: float,
) -> list[Finding]:
    """Tell which captions are missing, repeated, or longer than the text encoder reads.

    Args:
        captions: of each picture.
        names: what a person calls the pictures.
        num_tokens: counts a caption's tokens.
        max_tokens: of the text encoder.
        max_bad: share of pictures without caption above which a run does not begin.
    """
    texts = [text for each in captions for text in each if text]
    several = sum(len(each) > 1 for each in captions)
    findings = [Finding("captions", f"{len(texts)} for {len(captions)} pictures, {len(set(texts))} different"
                        + (f"; {several} pictures have several" if several else ""))]  # fmt: skip
    empty = [i for i, each in enumerate(captions) if not any(each)]
    if empty:
        share = len(empty) / len(captions)
        text = f"{len(empty)} pictures ({share:.1%}) have none: {_listed(names[i] for i in empty)}"
        findings.append(Finding("captions", text, "ruin" if share > max_bad else "warning"))
    (most, times), *_ = Counter(texts).most_common(1) or [("", 0)]
    if times > max(2, 0.05 * len(texts)):
        level: Level = "ruin" if times > 0.9 * len(texts) else "warning"
        findings.append(
            Finding("captions", f"{times} ({times / len(texts):.0%}) are the same: '{_short(most)}'", level)
        )
    lengths = {text: num_tokens(text) for text in set(texts)}
    long = [text for text in dict.fromkeys(texts) if lengths[text] > max_tokens]
    if long:
        num = sum(lengths[text] > max_tokens for text in texts)
        level = "warning" if num > 0.05 * len(texts) else "note"
        examples = "; ".join(f"'{_short(text)}' ({lengths[text]})" for text in long[:3])
        findings.append(
            Finding("captions", f"{num} ({num / len(texts):.1%}) are longer than {max_tokens} tokens and are cut: "
                    f"{examples}", level)
        )  # fmt: skip
    return findings


def _examples(groups: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    shown = "; ".join(" = ".join(names[i] for i in group[:3]) for group in groups[:3])
    return shown + ("; …" if len(groups) > 3 else "")


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
