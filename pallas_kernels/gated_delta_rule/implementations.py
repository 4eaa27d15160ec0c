"""The implementations of the gated delta rule, in order of preference: kernels where a recorded benchmark puts them ahead, XLA everywhere."""

from pallas_kernels.dispatch import Implementation
from pallas_kernels.gated_delta_rule import xla

IMPLEMENTATIONS = (Implementation("xla", xla.gated_delta_rule),)
