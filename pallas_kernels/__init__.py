"""Operators on plain JAX arrays. One folder holds everything about an operator.

    api.py              the contract
    reference.py        the definition, in any precision
    xla.py, xla_*.py    the portable implementation
    tpu/, hopper/       kernels by architecture
    step.py             the one-token step
    state.py            the state between calls
    partition.py        how it is split over a mesh
    tuning.py           measured sizes
    implementations.py  all implementations, in order of preference

operators.py lists the operators, dispatch.py chooses an implementation, hardware.py knows the
devices. A new implementation is a new file and one line in implementations.py; from outside the
package, `Operator.register`. Nothing here depends on models or parameters.
"""
