"""InfiniteVL in JAX: run, train and convert vision-language models with linear attention."""

from infinitevl_jax.errors import InfiniteVLError, InfiniteVLWarning
from infinitevl_jax.extras import says_which_extra

__version__ = "0.1.0"
__all__ = ["InfiniteVL", "InfiniteVLError", "InfiniteVLWarning", "Processor", "Sampling"]


def __getattr__(name: str):
    # Imported on use: the model and the processor have different dependencies.
    with says_which_extra():
        if name == "InfiniteVL":
            from infinitevl_jax.serve.infinitevl import InfiniteVL

            return InfiniteVL
        if name == "Sampling":
            from infinitevl_jax.serve.sampling import Sampling

            return Sampling
        if name == "Processor":
            from infinitevl_jax.processing import Processor

            return Processor
    raise AttributeError(f"module 'infinitevl_jax' has no attribute {name!r}")
