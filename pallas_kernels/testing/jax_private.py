"""All private names of JAX that this project uses, and the version they were seen in.

Only the interpreter of Mosaic GPU kernels on a CPU needs them (mosaic_gpu_interpreter.py). No other
module may name a private part of JAX.
"""

from types import SimpleNamespace

VERSION = (0, 11, 2)
"""The version of JAX that has all names below as they are used."""


def mosaic_gpu_interpreter() -> SimpleNamespace:
    """JAX's interpreter of Mosaic GPU kernels. Call it only where JAX has that version.

    `*_RULE` are names of methods of `JaxprInterpreter`, to be patched.
    """
    from jax._src import callback
    from jax._src.pallas.mosaic_gpu import core, primitives
    from jax._src.pallas.mosaic_gpu.interpret import (
        gpu_callbacks,
        interpret_pallas_call,
        jaxpr_interpret,
        params,
        shared_memory,
    )

    return SimpleNamespace(
        io_callback=callback.io_callback,
        primitives=primitives,
        callbacks=gpu_callbacks,
        get_shared_memory=gpu_callbacks._get_shared_memory,
        remove_noop_transforms=gpu_callbacks._remove_noop_transforms,
        get_races=interpret_pallas_call.get_races,
        JaxprInterpreter=jaxpr_interpret.JaxprInterpreter,
        WGMMA_RULE="_interpret_wgmma_ref_p",
        TCGEN05_RULE="_interpret_tcgen05_mma_p",
        SWAP_RULE="_interpret_swap_p",
        INLINE_RULE="_interpret_inline_mgpu_p",
        ClusterRefTransform=core.ClusterRefTransform,
        resolve_ref=jaxpr_interpret.resolve_ref,
        interpret_mode=params.force_gpu_interpret_mode,
        InterpretParams=params.InterpretGPUParams,
        Barrier=shared_memory.Barrier,
    )
