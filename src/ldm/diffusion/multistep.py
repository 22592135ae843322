"""Samplers that remember: each step is guided by several x̂_0, at one evaluation per step.

Their contract is that of `samplers`.

B batch, C channels, h w latents, N sampling steps.
"""

import math
from collections import deque
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.steps import Callback, Denoise, Noise, advance, at_least_float32


@torch.no_grad()
def lms(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None) -> Tensor:
    """Sample with a linear multistep method (Adams and Bashforth's), k-diffusion's `sample_lms`: fourth order.

    N evaluations, no draws. The slope (x - x̂_0) / sigma is extrapolated by the polynomial through its last four
    values, and integrated exactly.
    """
    x = at_least_float32(x)
    slopes: deque[Tensor] = deque(maxlen=4)
    known: deque[float] = deque(maxlen=4)  # the sigmas of the slopes
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma
        slopes.append(slope)
        known.append(sigma)
        x = advance(x, denoised, sigma, sigma_next, noise)
        # The weights add up to sigma_next - sigma: what the step has not done is told by how the slopes differ.
        for weight, earlier in zip(lagrange_integrals(known, sigma, sigma_next), slopes, strict=True):
            x = x + weight * (earlier - slope)
        if callback is not None:
            callback(step, x, denoised)
    return x


def lagrange_integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Integrate, from start to end, the Lagrange polynomials of up to four nodes: 1 at one of them, 0 at the others.

    Gauss and Legendre's two points integrate a cubic exactly.

    >>> [round(24 * weight, 9) for weight in lagrange_integrals([0, 1, 2, 3], 3, 4)]  # Adams-Bashforth
    [-9.0, 37.0, -59.0, 55.0]
    """
    middle, half = (start + end) / 2, (end - start) / 2
    points = (middle - half / math.sqrt(3), middle + half / math.sqrt(3))

    def polynomial(k: int, point: float) -> float:
        others = [node for j, node in enumerate(nodes) if j != k]
        return math.prod((point - node) / (nodes[k] - node) for node in others)

    return [half * sum(polynomial(k, point) for point in points) for k in range(len(nodes))]


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None, eta: float = 0.0
) -> Tensor:
    """Sample with DPM-Solver++(2M) (arXiv:2211.01095 Alg. 2): second order.

    Each step goes towards x̂_0 as the last two foretell it for the step's middle in log sigma. N evaluations, no draws;
    η = 1 makes it `dpmpp_2m_sde`.
    """
    x = at_least_float32(x)
    before: tuple[Tensor, float] | None = None
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        x = advance(x, midpoint(denoised, before, sigma, sigma_next), sigma, sigma_next, noise, eta)
        before = denoised, sigma
        if callback is not None:
            callback(step, x, denoised)
    return x


def midpoint(denoised: Tensor, before: tuple[Tensor, float] | None, sigma: float, sigma_next: float) -> Tensor:
    """Extrapolate x̂_0 to the middle of a step in log sigma, from its start and the one before (x̂_0, sigma).

    arXiv:2211.01095 Alg. 2:  D = (1 + 1 / 2r) x̂_0 - 1 / 2r x̂_0', r the ratio of the step before to this one in
    log sigma. Without one before, or in the endless step to 0, D = x̂_0.
    """
    if before is None or sigma_next == 0:
        return denoised
    denoised_before, sigma_before = before
    r = math.log(sigma_before / sigma) / math.log(sigma / sigma_next)
    return denoised + (denoised - denoised_before) / (2 * r)


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None) -> Tensor:
    """Sample with SDE-DPM-Solver++(2M) (arXiv:2211.01095): DPM-Solver++(2M) with η = 1.

    N evaluations, N - 1 draws.
    """
    return dpmpp_2m(denoise, x, sigmas, noise, callback, eta=1.0)


@torch.no_grad()
def unipc(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, callback: Callback | None = None) -> Tensor:
    """Sample with UniPC of order 2, data prediction, B(h) = e^h - 1 (arXiv:2302.04867): UniP-2 and UniC-2.

    The predictor is DPM-Solver++(2M). The x̂_0 found where a step ended corrects that step in hindsight, to third
    order. N evaluations, no draws.
    """
    x = at_least_float32(x)
    origin = x  # where the last step started
    history: list[tuple[Tensor, float]] = []  # x̂_0 and sigma of the last two
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas.tolist())):
        denoised = denoise(x, sigma)
        if history:
            x = advance(origin, hindsight(denoised, sigma, history), history[-1][1], sigma, noise)
        origin = x
        estimate = midpoint(denoised, history[-1] if history else None, sigma, sigma_next)
        x = advance(x, estimate, sigma, sigma_next, noise)
        history = [*history[-1:], (denoised, sigma)]
        if callback is not None:
            callback(step, x, denoised)
    return x


def hindsight(denoised: Tensor, sigma: float, history: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Average x̂_0 over the step that ended at sigma: from what is known there, at its start, and one step before.

    UniC-2 of arXiv:2302.04867, its linear system solved: the mean over τ, log sigma from 0 at the step's start to 1 at
    its end, of the parabola through the three x̂_0, under the weight e^(hτ) that the exact solution gives them. With one
    step of history it is UniC-1, the mean of the two.

    Args:
        denoised: x̂_0 at sigma.
        sigma: where the step ended.
        history: x̂_0 and sigma of one or two steps before.
    """
    denoised_start, sigma_start = history[-1]
    change = denoised - denoised_start
    if len(history) == 1:
        return denoised_start + change / 2
    denoised_before, sigma_before = history[-2]
    h = math.log(sigma_start / sigma)
    r = math.log(sigma_before / sigma_start) / h
    # x̂_0(τ) = start + (change - curve) τ + curve τ², through before at τ = -r
    curve = (change - (denoised_start - denoised_before) / r) / (1 + r)
    mean = -1 / math.expm1(-h) - 1 / h  # of τ
    square_mean = -1 / math.expm1(-h) - 2 * mean / h  # of τ²
    return denoised_start + mean * (change - curve) + square_mean * curve
