"""InfiniteVL in JAX: run, train and convert vision-language models with linear attention."""

from typing import TYPE_CHECKING

from infinitevl_jax.errors import InfiniteVLError, InfiniteVLWarning
from infinitevl_jax.extras import says_which_extra

__version__ = "0.1.0"
__all__ = ["InfiniteVL", "InfiniteVLError", "InfiniteVLWarning", "Processor", "Sampling"]

if TYPE_CHECKING:
    from infinitevl_jax.processing import Processor
    from infinitevl_jax.serve.infinitevl import InfiniteVL
    from infinitevl_jax.serve.sampling import Sampling
else:
    # Imported on use: the model and the processor have different dependencies.
    def __getattr__(name: str):
        with says_which_extra():
            if name == "InfiniteVL":
                from infinitevl_jax.serve.infinitevl import InfiniteVL as found
            elif name == "Sampling":
                from infinitevl_jax.serve.sampling import Sampling as found
            elif name == "Processor":
                from infinitevl_jax.processing import Processor as found
            else:
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return found
