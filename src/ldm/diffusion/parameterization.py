"""What the network predicts, and how to turn one prediction into another.

All live on x_t = alpha x_0 + sigma ε: variance-preserving with alpha² + sigma² = 1, or a flow with alpha + sigma = 1.
alpha and sigma are (B, 1, 1, 1) tensors, as `NoiseSchedule.coefficients` gives them, or floats; every other tensor is
(B, C, h, w). The names are diffusers':

- `epsilon`: the noise ε (DDPM, arXiv:2006.11239 Eq. 14)
- `v_prediction`: the velocity v = alpha ε - sigma x_0 (arXiv:2202.00512 §4)
- `sample`: the clean x_0 itself
- `flow_prediction`: the velocity ε - x_0 of a rectified flow (arXiv:2209.03003 Eq. 1, with time running to noise)

B batch, C channels, h w latents.
"""

from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")


def check_prediction_type(prediction_type: str, zero_terminal_snr: bool = False) -> None:
    """Refuse a name that is no prediction type, and one that a schedule cannot be sampled with.

    Args:
        prediction_type: what the network predicts.
        zero_terminal_snr: whether the last timestep is pure noise.

    Raises:
        ValueError: `prediction_type` is none of `PREDICTION_TYPES`, or is `epsilon` where pure noise is a timestep:
            x_T = ε says nothing of x_0 (arXiv:2305.08891 §3.2).
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}")
    if prediction_type == "epsilon" and zero_terminal_snr:
        raise ValueError(
            "prediction_type is 'epsilon', but this schedule ends in pure noise, where knowing the noise leaves x_0 "
            "unknown; train with v_prediction, or without rescale_betas_zero_snr"
        )


def target(prediction_type: str, x_0: Tensor, noise: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Compute what the network should have said.

    Raises:
        ValueError: an unknown `prediction_type`.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return alpha * noise - sigma * x_0
    if prediction_type == "flow_prediction":
        return noise - x_0
    return x_0


def to_denoised(
    prediction_type: str, prediction: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> Tensor:
    """Turn a prediction at x_t into x̂_0.

    Raises:
        ValueError: an unknown `prediction_type`.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return (x_t - sigma * prediction) / alpha
    if prediction_type == "v_prediction":
        return (alpha * x_t - sigma * prediction) / (alpha**2 + sigma**2)
    if prediction_type == "flow_prediction":
        return (x_t - sigma * prediction) / (alpha + sigma)
    return prediction


def to_eps(
    prediction_type: str, prediction: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> Tensor:
    """Turn a prediction at x_t into the noise it implies.

    Raises:
        ValueError: an unknown `prediction_type`.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "v_prediction":
        return (alpha * prediction + sigma * x_t) / (alpha**2 + sigma**2)
    if prediction_type == "flow_prediction":
        return (x_t + alpha * prediction) / (alpha + sigma)
    return (x_t - alpha * prediction) / sigma


def to_prediction(
    prediction_type: str, denoised: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> Tensor:
    """Turn x̂_0 at x_t into the prediction that says so, the inverse of `to_denoised`; sigma must not be 0.

    Raises:
        ValueError: an unknown `prediction_type`.
    """
    eps = to_eps("sample", denoised, x_t, alpha, sigma)
    return target(prediction_type, denoised, eps, alpha, sigma)
