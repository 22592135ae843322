"""Averages of any length out of a few: the mathematics against sums over every step, then files."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.integrate import quad

from ldm.errors import UserError
from ldm.weights.posthoc import (
    Snapshot,
    combination,
    drop_snapshots,
    exponent,
    inner_products,
    reconstruct,
    save_snapshot,
)

STEPS, EVERY, LENGTHS = 2000, 100, (0.05, 0.1)


def profile(steps: int, length: float, num: int = STEPS) -> np.ndarray:
    """The weight that each step's weights have in the average: τ^γ integrated from step to step, by the definition."""
    gamma = exponent(length)
    ends = np.minimum(np.arange(num + 1) / steps, 1) ** (gamma + 1)
    return np.diff(ends)


def walk(seed: int = 0, num: int = STEPS, size: int = 200) -> np.ndarray:
    """Weights on their way: somewhere far off zero, drifting, with noise on top."""
    rng = np.random.default_rng(seed)
    drift = np.sin(np.linspace(0, 6, num))[:, None] * rng.normal(size=size)
    return rng.normal(size=size) * 3 + drift + rng.normal(size=(num, size)) * 0.3


def kept(steps: int = STEPS, every: int = EVERY, lengths: tuple[float, ...] = LENGTHS) -> tuple[list[int], list[float]]:
    pairs = [(at, length) for at in range(every, steps + 1, every) for length in lengths]
    return [at for at, _ in pairs], [length for _, length in pairs]


# ------------------------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.25, 1.0)])
def test_the_exponents_of_the_paper(length, gamma):
    """16.97 and 6.94 are the paper's; the last is worked out by hand: √2 / (3 · 2) = 0.2357."""
    if length == 0.25:
        assert exponent(2**0.5 / 6) == pytest.approx(gamma)
    else:
        assert exponent(length) == pytest.approx(gamma, abs=0.005)


@given(st.floats(0.005, 0.288))
def test_a_length_is_the_deviation_of_its_profile(length):
    gamma = exponent(length)
    density = lambda x: (gamma + 1) * x**gamma  # noqa: E731
    mean = quad(lambda x: x * density(x), 0, 1)[0]
    variance = quad(lambda x: (x - mean) ** 2 * density(x), 0, 1)[0]
    assert variance**0.5 == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("length", [0, -0.1, 0.3, float("nan")])
def test_lengths_that_are_none(length):
    with pytest.raises(ValueError, match="relative length"):
        exponent(length)


@given(st.integers(1, 50), st.floats(0, 40), st.integers(1, 50), st.floats(0, 40))
def test_inner_products_are_the_integrals(t_a, gamma_a, t_b, gamma_b):
    def product(tau: float) -> float:
        return (gamma_a + 1) / t_a * (tau / t_a) ** gamma_a * (gamma_b + 1) / t_b * (tau / t_b) ** gamma_b

    expected = quad(product, 0, min(t_a, t_b))[0]
    assert float(inner_products(t_a, gamma_a, t_b, gamma_b)) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_they_stay_numbers_after_millions_of_steps():
    products = inner_products([1, 10**7], exponent(0.01), 10**7, exponent(0.01))
    assert np.isfinite(products).all() and products[0] < 1e-300 < products[1]


# The error of the average, as a share of how far it lies from the mean of all weights; what these tests found is half
# of it. Paper: figures of appendix C show the profiles alone.
@pytest.mark.parametrize(
    ("length", "most"),
    [(0.02, 1.6e-2), (0.03, 4e-3), (0.04, 1e-3), (0.07, 3e-4), (0.12, 2e-4), (0.15, 3e-4), (0.2, 5e-3)],
)
def test_the_average_of_any_length_is_near_the_one_computed_directly(length, most):
    weights = walk()
    steps, lengths = kept()
    averages = np.stack([profile(*each) @ weights for each in zip(steps, lengths, strict=True)])
    factors, error = combination(steps, lengths, length, STEPS)
    expected = profile(STEPS, length) @ weights
    off = np.linalg.norm(factors @ averages - expected) / np.linalg.norm(expected - weights.mean(0))
    assert off < most and error < 0.1
    assert factors.sum() == pytest.approx(1, abs=1e-9)


def test_the_error_told_is_that_of_the_profile():
    steps, lengths = kept()
    factors, error = combination(steps, lengths, 0.2, STEPS)
    mine = factors @ np.stack([profile(*each) for each in zip(steps, lengths, strict=True)])
    expected = profile(STEPS, 0.2)
    assert error == pytest.approx(np.linalg.norm(mine - expected) / np.linalg.norm(expected), rel=0.02)


def test_least_squares_finds_the_best_factors():
    """No neighbour with the same sum does better."""
    steps, lengths = kept(every=500)
    factors, error = combination(steps, lengths, 0.07, STEPS)
    profiles = np.stack([profile(*each) for each in zip(steps, lengths, strict=True)])
    expected = profile(STEPS, 0.07)
    rng = np.random.default_rng(0)
    for _ in range(100):
        step = rng.normal(size=len(factors)) * 0.01
        near = (factors + step - step.mean()) @ profiles
        assert np.linalg.norm(near - expected) / np.linalg.norm(expected) > error * 0.999


def test_what_was_kept_is_itself():
    steps, lengths = kept()
    for length in LENGTHS:
        factors, error = combination(steps, lengths, length, STEPS)
        assert error == 0 and sorted(factors)[-2:] == [0, 1]
        assert (steps[int(factors.argmax())], lengths[int(factors.argmax())]) == (STEPS, length)


def test_what_stands_still_stays(tmp_path):
    """Whatever the length, and however few snapshots."""
    for length in (0.03, 0.07, 0.2):
        assert combination([500, 1000], [0.05, 0.05], length, 1000)[0].sum() == pytest.approx(1, abs=1e-9)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def folder(tmp_path):
    """Snapshots of a walk of two tensors."""
    weights = walk()
    for steps, length in zip(*kept(), strict=True):
        average = torch.from_numpy(profile(steps, length) @ weights).float()
        state = {"a": average[:50], "b": average[50:].view(15, 10)}
        save_snapshot(tmp_path / "ema", Snapshot(steps, length), state, EVERY)
    return tmp_path / "ema"


def direct(length: float, steps: int = STEPS) -> torch.Tensor:
    return torch.from_numpy(profile(steps, length) @ walk())


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state["a"], state["b"].flatten()]).double()


def test_averages_are_put_together_from_files(folder):
    found = reconstruct(folder, 0.07)
    assert found.steps == STEPS and found.error < 0.003 and found.missing == []
    assert found.state["b"].shape == (15, 10) and found.state["a"].dtype == torch.float32
    torch.testing.assert_close(flat(found.state), direct(0.07), rtol=0, atol=3e-4)
    assert (flat(found.state) - direct(0.05)).abs().max() > 0.01


def test_a_kept_length_is_its_file(folder):
    found = reconstruct(folder, 0.1)
    kept = load_file(folder / "step-0002000-length-0.1.safetensors")
    assert all(torch.equal(found.state[name], kept[name]) for name in kept)


def test_lengths_out_of_reach_are_refused_with_those_within(folder):
    for length in (0.01, 0.28):
        with pytest.raises(UserError, match=r"Within reach are 0\.019 to 0\.26\d; more snapshots"):
            reconstruct(folder, length)
    reconstruct(folder, 0.02), reconstruct(folder, 0.25)


def test_missing_snapshots_are_named(folder):
    (folder / "step-0001900-length-0.05.safetensors").unlink()
    assert reconstruct(folder, 0.07).missing == [Snapshot(1900, 0.05)]
    for path in folder.glob("step-0001*"):
        path.unlink()
    assert len(reconstruct(folder, 0.07).missing) == 20
    with pytest.raises(UserError, match=r"missing are step-0001000-length-0\.05\.safetensors, .* and 16 more"):
        reconstruct(folder, 0.03)


def test_the_last_step_need_not_be_a_multiple(folder):
    for length in LENGTHS:
        state = {"a": torch.ones(50), "b": torch.ones(15, 10)}
        save_snapshot(folder, Snapshot(2010, length), state, EVERY)
    found = reconstruct(folder, 0.1)
    assert found.steps == 2010 and found.missing == [] and found.state["a"].eq(1).all()


def test_later_snapshots_are_dropped(folder):
    drop_snapshots(folder, after=1750)
    assert len(list(folder.iterdir())) == 34
    assert reconstruct(folder, 0.1).steps == 1700
    drop_snapshots(folder.parent / "nowhere", after=0)


def test_damage_is_told(folder):
    with pytest.raises(UserError, match=r"holds no averages .*posthoc_ema"):
        reconstruct(folder.parent / "nowhere", 0.1)
    last = folder / "step-0002000-length-0.1.safetensors"
    last.write_bytes(last.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"length-0\.1\.safetensors cannot be read"):
        reconstruct(folder, 0.1)
    last.unlink()
    (folder / "step-0001000-length-0.1.safetensors").rename(last)
    with pytest.raises(UserError, match=r"is no average of a run: it says that it is step-0001000"):
        reconstruct(folder, 0.1)


def test_tensors_that_do_not_go_together_are_told(folder):
    save_snapshot(folder, Snapshot(2000, 0.1), {"a": torch.ones(3)}, EVERY)
    with pytest.raises(UserError, match="cannot be added up"):
        reconstruct(folder, 0.07)


def test_a_snapshot_says_what_it_is(folder):
    from ldm.weights.tensors import read_metadata

    told = json.loads(read_metadata(folder / "step-0000100-length-0.05.safetensors")["average"])
    assert told == {"steps": 100, "length": 0.05, "every": EVERY}


@pytest.mark.parametrize("told", [
    '{"steps": Infinity, "length": 0.1, "every": 1}', '{"steps": 1000, "length": 0.1, "every": Infinity}',
    "[" * 100_000, "[1]", '{"steps": 1000000000, "length": 0.1, "every": 1}',
])  # fmt: skip
def test_what_a_snapshot_says_of_itself_may_be_anything(tmp_path, told):
    from ldm.weights.tensors import write_weights

    for steps in (1000, 10**9):
        write_weights(tmp_path / f"step-{steps:07d}-length-0.1.safetensors", {"a": torch.ones(3)}, {"average": told})
    with pytest.raises(UserError, match="is no average of a run"):
        reconstruct(tmp_path, 0.1)
