"""Drawn pictures against real ones: FID and KID as Inception sees them, a Fréchet distance and CMMD as a CLIP does."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ldm.errors import UserError
from ldm.evaluation.distances import cmmd, frechet_distance, kernel_distance
from ldm.evaluation.subject import Subject

Measure = Callable[[Tensor, Tensor], dict[str, float]]
"""measure(real, drawn) of (N, D) and (M, D) features gives a figure under `value`, and what else there is to say."""


def fid(subject: Subject) -> dict[str, Any]:
    """Measure FID, and say that of few pictures it is too large."""
    found = _compare(subject, "inception", lambda real, drawn: {"value": frechet_distance(real, drawn)})
    if (fewest := min(found["num_drawn"], found["num_real"])) < 2048:  # features: the covariance is not of full rank
        subject.say(
            f"note: FID over {fewest} pictures is far too large (10,000 are usual); kid does not depend on how many"
        )
    return found


def kid(subject: Subject) -> dict[str, Any]:
    """Measure KID, not multiplied by anything, with its standard deviation over subsets."""

    def measure(real: Tensor, drawn: Tensor) -> dict[str, float]:
        mean, std = kernel_distance(real, drawn, seed=subject.config.seed)
        return {"value": mean, "std": std}

    return _compare(subject, "inception", measure)


def clip_frechet(subject: Subject) -> dict[str, Any]:
    """Measure the Fréchet distance over a CLIP's embeddings as they come out of it, not normalised."""
    return _compare(subject, "clip", lambda real, drawn: {"value": frechet_distance(real, drawn)})


def clip_mmd(subject: Subject) -> dict[str, Any]:
    """Measure CMMD."""
    return _compare(subject, "clip", lambda real, drawn: {"value": cmmd(real, drawn)})


def _compare(subject: Subject, eye: str, measure: Measure) -> dict[str, Any]:
    """Measure how far the pictures of each setting are from real ones, as `eye` sees them.

    `floor` is the distance of as many other real pictures, of training where held-out ones are compared with, and the
    other way round: about what a model has that draws new pictures of the very same kind. Where held-out pictures are
    those whose captions were drawn, which is all but the built-in world, a distance may come out below it.
    """
    config = subject.config
    split, other, num = ("fresh", "train", None) if config.real == "val" else ("train", "fresh", config.num_train)
    real = subject.real_features(eye, split, num)
    reference = subject.real_features(eye, other, config.num_prompts)
    if min(len(real), len(reference)) < 2:
        raise UserError(
            f"the run holds {len(subject.real('val'))} picture out of training, and to compare takes two at least"
        )
    results: dict[str, Any] = {
        "values": [
            {**setting._asdict(), **measure(real, subject.drawn_features(eye, setting))} for setting in subject.settings
        ],
        "floor": measure(real, reference)["value"],
        "split": config.real,
        "num_real": len(real),
        "num_drawn": config.num_prompts,
    }
    return results | ({"clip": subject.clip.source} if eye == "clip" else {})
