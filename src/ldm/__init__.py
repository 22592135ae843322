"""Train text-to-image latent diffusion models: from captioned pictures to a model that draws what it is told."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.pipeline import LatentDiffusionPipeline

__version__ = "0.1.0"
__all__ = ["LatentDiffusionPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "LatentDiffusionPipeline":  # on demand: torch takes seconds to import
        from ldm.pipeline import LatentDiffusionPipeline

        return LatentDiffusionPipeline
    raise AttributeError(f"module 'ldm' has no attribute '{name}'")
