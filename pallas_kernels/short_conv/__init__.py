"""Short causal depthwise convolution with SiLU, in front of the gated delta rule."""

from pallas_kernels.short_conv.api import short_conv

__all__ = ["short_conv"]
