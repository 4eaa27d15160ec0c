"""Per-head L2 normalisation of [..., heads * dim], used by queries, keys and the gated norm of
Gated DeltaNet."""

from pallas_kernels.l2norm.api import l2norm

__all__ = ["l2norm"]
