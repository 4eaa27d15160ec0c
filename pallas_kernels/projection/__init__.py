"""Matrix products of a few rows with a large matrix, with what stands before and after them in a
decoder layer."""

from pallas_kernels.projection.api import projection

__all__ = ["projection"]
