"""What the network predicts, and how to turn one prediction into another.

All live on x_t = alpha x_0 + sigma ε with alpha² + sigma² = 1. alpha and sigma are (B, 1, 1, 1) tensors, as
`NoiseSchedule.coefficients` gives them, or floats; every other tensor is (B, C, h, w). The names are diffusers':

- `epsilon`: the noise ε (DDPM, arXiv:2006.11239 Eq. 14)
- `v_prediction`: the velocity v = alpha ε - sigma x_0 (arXiv:2202.00512 §4)
- `sample`: the clean x_0 itself

B batch, C channels, h w latents.
"""

from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def check_prediction_type(prediction_type: str) -> None:
    """Refuse a name that is no prediction type.

    Raises:
        ValueError: `prediction_type` is none of `PREDICTION_TYPES`; the message names them.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type is {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}")


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
        return alpha * x_t - sigma * prediction
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
        return alpha * prediction + sigma * x_t
    return (x_t - alpha * prediction) / sigma
