"""Short causal depthwise convolution with SiLU and a three-token tail, the local mixer in front of the gated delta rule."""

from pallas_kernels.causal_conv.xla import causal_conv

__all__ = ["causal_conv"]
