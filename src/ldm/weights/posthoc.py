"""Averages of a run's weights, of any length, put together after training from a few that were kept (EDM2).

Training keeps averages of some lengths at some steps; a least-squares combination of them stands for the average of a
length that nobody kept.

N snapshots.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import safe_open
from torch import Tensor

from ldm.errors import UserError
from ldm.files import parse_json
from ldm.weights.tensors import read_metadata, write_weights

MOST = 0.1  # error of a profile, as a share of its size, that is taken; that of weights has been a tenth of it
MOST_SNAPSHOTS = 10**5  # of a length
FOLDER = "ema"  # of a run directory, where its snapshots are


class Snapshot(NamedTuple):
    """An average that was kept: `steps` optimizer steps went into it, its relative length is `length`."""

    steps: int
    length: float

    @property
    def name(self) -> str:
        return f"step-{self.steps:07d}-length-{self.length:g}.safetensors"


class Reconstruction(NamedTuple):
    """An average put together: its weights, after how many steps, how far off its profile is, what was missing."""

    state: dict[str, Tensor]
    steps: int
    error: float
    missing: list[Snapshot]


def exponent(length: float) -> float:
    """Return γ of the average whose weights at step τ are in proportion to τ^γ, for its relative length σ_rel.

    EDM2 (arXiv:2312.02696) section 3.1 and Algorithm 2: the profile's standard deviation, as a share of the time
    trained, is  σ_rel = (γ + 1)^½ (γ + 2)⁻¹ (γ + 3)^-½,  so γ is the greatest real root of
    γ³ + 7 γ² + (16 - σ⁻²) γ + (12 - σ⁻²) = 0.

    Raises:
        ValueError: `length` is not in (0, 0.288]; γ = 0, the mean of all weights since the start, has 0.2887.

    >>> round(exponent(0.05), 2), round(exponent(0.10), 2)
    (16.97, 6.94)
    """
    if not 0 < length <= 0.288:
        raise ValueError(f"a relative length of {length:g} is none in (0, 0.288]")
    precision = length**-2
    roots = np.roots([1, 7, 16 - precision, 12 - precision])
    return float(roots.real[np.abs(roots.imag) < 1e-9 * np.abs(roots)].max())


def inner_products(t_a: ArrayLike, gamma_a: ArrayLike, t_b: ArrayLike, gamma_b: ArrayLike) -> NDArray[np.float64]:
    """Return ∫ p_a p_b dτ of profiles  p(τ) = (γ + 1) τ^γ / t^(γ+1)  on [0, t], and 0 beyond.

    EDM2 (arXiv:2312.02696) appendix C, worked out: with t = min(t_a, t_b),
    (γ_a + 1)(γ_b + 1) / (γ_a + γ_b + 1) · t^(γ_a+γ_b+1) / (t_a^(γ_a+1) t_b^(γ_b+1)).

    Args:
        t_a, gamma_a, t_b, gamma_b: steps and exponents, which broadcast.
    """
    t_a, gamma_a, t_b, gamma_b = (np.asarray(each, np.float64) for each in (t_a, gamma_a, t_b, gamma_b))
    shorter = np.where(t_a < t_b, gamma_b, gamma_a)  # the exponent of the profile that goes on for longer
    ratio = (np.minimum(t_a, t_b) / np.maximum(t_a, t_b)) ** shorter  # no power of a step by itself: it would overflow
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio / np.maximum(t_a, t_b)


def combination(
    steps: Sequence[int], lengths: Sequence[float], length: float, at: int
) -> tuple[NDArray[np.float64], float]:
    """Return (N,) factors x of kept averages that stand for another, and how far off their sum is.

    EDM2 (arXiv:2312.02696) section 3.2 and Algorithm 3: x minimises ∫ (p(τ) - Σ x_i p_i(τ))² dτ, a linear system of
    inner products. Here also Σ x_i = 1, so that a weight that stood still comes out as it is. An average that was kept
    is itself, to the bit.

    Args:
        steps, lengths: of the kept averages.
        length: wanted.
        at: the step at which it is wanted.

    Returns:
        The factors, and the root of the integral above over that of p².
    """
    t, gamma = np.array(steps, np.float64), np.array([exponent(each) for each in lengths])
    target = exponent(length)
    same = (t == at) & (np.array(lengths) == length)
    if same.any():
        return same / same.sum(), 0.0
    norm = np.sqrt(inner_products(t, gamma, t, gamma))
    gram = inner_products(t[:, None], gamma[:, None], t, gamma) / norm[:, None] / norm
    own = float(inner_products(at, target, at, target)) ** 0.5
    towards = inner_products(t, gamma, at, target) / norm / own
    total = 1 / norm  # of x = y / norm / …: Σ x_i = 1 in the scaled factors
    system = np.block([[gram, total[:, None]], [total, np.zeros((1, 1))]])
    solved = np.linalg.lstsq(system, np.append(towards, 1 / own), rcond=1e-12)[0][:-1]
    squared = 1 - 2 * towards @ solved + solved @ gram @ solved
    return solved * own / norm, float(max(squared, 0.0) ** 0.5)


def save_snapshot(folder: Path, snapshot: Snapshot, state: Mapping[str, Tensor], every: int) -> None:
    """Keep an average, whole or not at all, in float32: factors of both signs would multiply the errors of less.

    Args:
        folder: of all snapshots of a run.
        snapshot: which one.
        state: its weights.
        every: steps between snapshots, by which a missing one is known.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = {"average": json.dumps({"steps": snapshot.steps, "length": snapshot.length, "every": every})}
    write_weights(folder / snapshot.name, state, told, torch.float32)


def drop_snapshots(folder: Path, after: int) -> None:
    """Remove what an earlier run left of steps after this one: this run comes to them anew."""
    for snapshot in _snapshots(folder)[0]:
        if snapshot.steps > after:
            (folder / snapshot.name).unlink()


def reconstruct(folder: Path, length: float) -> Reconstruction:
    """Put together the average of a relative length at the last step that was kept.

    Raises:
        UserError: there are no snapshots, one is damaged, or those that there are do not tell of this length.
    """
    found, every = _snapshots(folder)
    if not found:
        raise UserError(
            f"{folder} holds no averages to put ema={length:g} together from: train with "
            "'diffusion.posthoc_ema={lengths: [0.05, 0.1], every: 500}'"
        )
    last = found[-1].steps
    due = {*range(every, last + 1, every), last}
    missing = sorted({Snapshot(at, each.length) for at in due for each in found} - {*found})
    factors, error = combination([each.steps for each in found], [each.length for each in found], length, last)
    if error > MOST:
        raise UserError(_out_of_reach(folder, found, missing, length, last, error))
    return Reconstruction(_sum(folder, found, factors), last, error, missing)


def _snapshots(folder: Path) -> tuple[list[Snapshot], int]:
    """Return the snapshots in a folder, by steps, and how many steps lie between them."""
    found, every = [], 1
    for path in folder.glob("step-*-length-*.safetensors"):
        try:
            told = parse_json(read_metadata(path)["average"], "what it says of itself")
            snapshot, every = Snapshot(int(told["steps"]), float(told["length"])), int(told["every"])
            exponent(snapshot.length)
            if snapshot.name != path.name or every < 1:
                raise ValueError(f"it says that it is {snapshot.name}")
            if snapshot.steps > MOST_SNAPSHOTS * every:
                raise ValueError(f"it says that it is of {snapshot.steps} steps, and one of every {every}")
        except (KeyError, TypeError, ValueError, OverflowError, UserError) as error:
            raise UserError(f"{path} is no average of a run: {error}. Take it out of the folder") from error
        found.append(snapshot)
    return sorted(found), every


def _out_of_reach(
    folder: Path, found: list[Snapshot], missing: list[Snapshot], length: float, last: int, error: float
) -> str:
    steps, lengths = [each.steps for each in found], [each.length for each in found]
    grid = [i / 1000 for i in range(5, 289)]
    near = [each for each in grid if combination(steps, lengths, each, last)[1] <= MOST]
    stored = sorted({each.length for each in found})
    return (
        f"ema={length:g} cannot be put together from the {len(found)} averages in {folder}: they miss its profile by "
        f"{error:.0%}, and {MOST:.0%} is the most that is taken. Within reach are "
        + (f"{near[0]:g} to {near[-1]:g}" if near else f"{', '.join(f'{each:g}' for each in stored)}")
        + (f"; missing are {listed(missing)}" if missing else "; more snapshots or other lengths reach further")
    )


def listed(snapshots: Sequence[Snapshot]) -> str:
    """Name snapshots, the first few of many."""
    names = ", ".join(each.name for each in snapshots[:4])
    return names + (f" and {len(snapshots) - 4} more" if len(snapshots) > 4 else "")


def _sum(folder: Path, found: Sequence[Snapshot], factors: NDArray[np.float64]) -> dict[str, Tensor]:
    """Add up snapshots, a tensor at a time in float64, so that one copy of the weights is held."""
    state: dict[str, Tensor] = {}
    with ExitStack() as stack:
        try:
            used = [(float(x), folder / each.name) for x, each in zip(factors, found, strict=True) if x]
            files = [(x, stack.enter_context(safe_open(path, framework="pt"))) for x, path in used]
            for name in files[0][1].keys():  # noqa: SIM118 it is no dict
                total = files[0][1].get_tensor(name).double().mul_(files[0][0])
                for x, file in files[1:]:
                    total.add_(file.get_tensor(name).double(), alpha=x)
                state[name] = total.float()
        except Exception as error:  # damaged bytes may fail anywhere
            raise UserError(f"the averages in {folder} cannot be added up, one is damaged: {error}") from error
    return state
