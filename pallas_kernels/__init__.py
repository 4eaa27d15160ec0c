"""Operators on plain JAX arrays. One folder an operator holds everything about it:

api.py: the contract; reference.py: the definition, in any precision; xla.py: the portable
implementation; tpu/ and hopper/: kernels by architecture; step.py: the one-token step; state.py:
the state between calls; partition.py: how it is split over a mesh; tuning.py: measured sizes;
implementations.py: which implementation comes first. operators.py lists the operators, dispatch.py
chooses, hardware.py knows the devices.

A new implementation is a new file and one line in implementations.py; from outside,
`Operator.register`. Nothing here knows of models or parameters.
"""
