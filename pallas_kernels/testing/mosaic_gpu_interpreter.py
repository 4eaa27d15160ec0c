"""Interprets Mosaic GPU kernels on a CPU and detects races.

JAX's own interpreter does it; what it lacks for Hopper is added here. The one of JAX 0.11.2 has no
wgmma with its left operand in registers, no store into an accumulator, no copy that adds, no store
into another thread block's memory and no barrier of a cluster in inline assembly. It also raises an
error when a kernel ends before each thread has waited for the last phase of a barrier. The one of
JAX 0.10.2 has no transposed operands either: `refusal` says so. The private parts of JAX are those
of jax_private.py. They are patched here and restored afterwards.

Each warpgroup of each thread block is a thread that waits in a callback, so XLA needs as many
threads. Start the process with the environment variable NPROC, which XLA reads, at a few dozen.
With fewer, kernels of several warpgroups wait forever.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from types import SimpleNamespace
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.testing import jax_private

THREADS = 32
BEGIN_SECONDS = 60
BLOCK_OF_KEY = 2  # the place of the thread block in a buffer's key


class Raced(RuntimeError):
    """Two threads of a kernel accessed the same memory without synchronisation."""


def refusal() -> str | None:
    """The reason kernels cannot be interpreted here, else None."""
    if jax.__version_info__ != jax_private.VERSION:
        wanted = ".".join(map(str, jax_private.VERSION))
        return f"for Hopper GPUs; interpreted by JAX {wanted} alone, this is {jax.__version__}"
    if int(os.environ.get("NPROC", "0")) < THREADS:
        return (
            f"for Hopper GPUs; interpreted in a process that was started with NPROC={2 * THREADS}"
        )
    return None


@contextmanager
def interpreted(races: bool = True) -> Iterator[None]:
    """Within this context, Mosaic GPU kernels that are traced run on the CPU. Wait for their
    results inside it. races: detect races, and raise Raced at the end if there was one."""
    jax_ = jax_private.mosaic_gpu_interpreter()
    callbacks, interpreter = jax_.callbacks, jax_.JaxprInterpreter
    with_both_in_memory = getattr(interpreter, jax_.WGMMA_RULE)
    swap_own = getattr(interpreter, jax_.SWAP_RULE)
    inline_none = getattr(interpreter, jax_.INLINE_RULE)
    deallocate = jax_.Barrier.deallocate
    plain_copy, adding = callbacks.copy_smem_to_gmem, Lock()

    def call(self, eqn, function, token, **arrays):
        run = partial(callbacks.fail_on_exception(function), source_info=eqn.source_info)
        place = {"mesh_location": self.mesh_location, "thread": self.thread}
        shape = callbacks.TOKEN_SHAPE_DTYPE
        return jax_.io_callback(run, shape, token=token, **place, **arrays), []

    def access(key, transforms, mesh_location, thread, source_info):
        """The memory, a buffer's key, the part accessed, and the thread that accesses it."""
        memory, key = jax_.get_shared_memory(), callbacks.HostAllocationKey.from_array(key)
        transforms = jax.tree.map(int, jax_.remove_noop_transforms(transforms))
        asks = callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)
        return memory, key, memory.access(key, transforms), {"logging_info": asks}

    def multiply(
        *, token, mesh_location, thread, acc, acc_transforms, a, b, b_transforms, source_info
    ):
        memory, key, part, asks = access(b, b_transforms, mesh_location, thread, source_info)
        right, _, _ = memory.get_buffer_content(key, part, thread, **asks)
        memory, key, part, asks = access(acc, acc_transforms, mesh_location, thread, source_info)
        total, _, _ = memory.get_buffer_content(key, part, thread, **asks)
        total = total + np.asarray(a).astype(np.float32) @ np.asarray(right).astype(np.float32)
        memory.store_buffer_content(key, part, total, thread, **asks)
        return token

    def wgmma(self, eqn, token, get_values):
        if hasattr(eqn.invars[1].aval, "inner_aval"):
            return with_both_in_memory(self, eqn, token, get_values)
        acc, a, b, *leaves = get_values()
        trees = (
            eqn.params[f"{name}_transforms_tree"] or jax.tree.structure([])
            for name in ("acc", "a", "b")
        )
        acc_transforms, _, b_transforms = jax.tree.unflatten(
            jax.tree_util.treedef_tuple(tuple(trees)), leaves
        )
        acc, acc_transforms = jax_.resolve_ref(eqn.invars[0].aval, acc, acc_transforms)
        b, b_transforms = jax_.resolve_ref(eqn.invars[2].aval, b, b_transforms)
        arrays = {
            "acc": acc,
            "acc_transforms": acc_transforms,
            "a": a,
            "b": b,
            "b_transforms": b_transforms,
        }
        return call(self, eqn, multiply, token, **arrays)

    def put(*, token, mesh_location, thread, acc, value, source_info):
        memory, key, part, asks = access(acc, (), mesh_location, thread, source_info)
        memory.store_buffer_content(key, part, np.asarray(value), thread, **asks)
        return token

    def store(self, eqn, token, values):
        return call(self, eqn, put, token, acc=values[0], value=values[1])

    class Addition(callbacks.AsyncCopySmemToGmemTask):
        """A copy that adds. The hardware adds element by element, so several do not race."""

        def __call__(self, engine):
            memory, asks = jax_.get_shared_memory(), {"logging_info": self.logging_info}
            self.pre_read(engine, memory)
            value, _, _ = memory.get_buffer_content(
                self.src_allocation_key, self.src_access, self.thread, **asks
            )
            self.clock.inc(engine)
            self.write_clock = self.clock.copy()
            with adding:
                total, _, _ = memory.get_buffer_content(
                    self.dst_allocation_key, self.dst_access, self.thread, **asks
                )
                memory.store_buffer_content(
                    self.dst_allocation_key, self.dst_access, total + value, self.thread, **asks
                )
            self.post_write(engine, memory)

    def copy(*, reduction_op, **arguments):
        return (plain_copy if reduction_op is None else add)(reduction_op=reduction_op, **arguments)

    def add(
        *,
        token,
        mesh_location,
        thread,
        source_info,
        reduction_op,
        predicate,
        commit_group,
        **places,
    ):
        if reduction_op != "add" or predicate is not None:
            raise ValueError(
                f"a copy that combines by {reduction_op} or under a predicate is not interpreted\n "
                " -> check it on a GPU"
            )
        ends = {}
        for end, name in (("src", "src_allocation_key"), ("dst", "dst_allocation_key")):
            key, transforms = places[f"{name}_as_array"], places[f"{end}_transforms"]
            memory, ends[name], ends[f"{end}_access"], _ = access(
                key, transforms, mesh_location, thread, source_info
            )
        memory.execute_async_task(
            Addition(
                mesh_location,
                thread,
                **ends,
                source_info=source_info,
                clock=memory.incr_clock(thread),
            )
        )
        return token

    def await_buffer(*, token, mesh_location, thread, key, source_info):
        """On a GPU all blocks of a cluster have begun before one does anything."""
        memory, key = jax_.get_shared_memory(), callbacks.HostAllocationKey.from_array(key)
        end = time.monotonic() + BEGIN_SECONDS
        while key not in memory.mem:
            memory.check_failed()
            if time.monotonic() > end:
                raise ValueError(f"{thread} writes into a block that has ended or never began")
            time.sleep(0.01)
        return token

    def swap(self, eqn, token, get_values):
        """A store; one into another block of the cluster goes to that block's buffer."""
        ref, value, *leaves = get_values()
        transforms = jax.tree.unflatten(eqn.params["tree"], leaves)
        blocks = [t for t in transforms if isinstance(t, jax_.ClusterRefTransform)]
        if not blocks:
            return swap_own(self, eqn, token, lambda: (ref, value, *leaves))
        if self.cluster_dims != (max(self.cluster_dims),) or len(blocks) > 1:
            raise ValueError(
                "a store into a block of a cluster of several axes is not interpreted\n  -> check"
                " it on a GPU"
            )
        key = jnp.asarray(ref).at[BLOCK_OF_KEY].set(blocks[0].idxs[0])
        token, _ = call(self, eqn, await_buffer, token, key=key)
        return callbacks.call_swap(
            token=token,
            result_shape_and_dtype=eqn.outvars[0].aval,
            mesh_location=self.mesh_location,
            thread=self.thread,
            allocation_key_as_array=key,
            transforms=tuple(t for t in transforms if t not in blocks),
            val=value,
            mask=None,
            source_info=eqn.source_info,
        )

    def pass_cluster_barrier(*, token, mesh_location, thread, blocks, arrives, source_info):
        memory = jax_.get_shared_memory()
        asks = callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)
        # The hardware has one such barrier a cluster: a named one, of no block.
        whole = SimpleNamespace(device_id=thread.device_id, block_id="cluster")
        barrier = memory.named_barrier(whole, 0, int(blocks))
        if arrives:
            barrier.arrive(thread, memory.incr_clock(thread) if races else None, asks)
        else:
            barrier.wait(thread, asks)
        return token

    def inline(self, eqn, token, get_values):
        arrives = {"cluster_arrive": True, "cluster_wait": False}.get(
            eqn.params["mgpu_fn"].__name__
        )
        if arrives is None:
            return inline_none(self, eqn, token, get_values)
        run = partial(pass_cluster_barrier, arrives=arrives)
        return call(self, eqn, run, token, blocks=jnp.int32(self.num_concurrent_threads))

    def end(self, *args, **kwargs):
        try:
            return deallocate(self, *args, **kwargs)
        except ValueError as error:
            if "observed" not in str(error):
                raise

    with (
        patch.object(interpreter, jax_.WGMMA_RULE, wgmma),
        # The rule for an operation of later GPUs is used for the one that has no rule.
        patch.object(jax_.primitives, "tcgen05_mma_p", jax_.primitives.wgmma_accumulator_store_p),
        patch.object(interpreter, jax_.TCGEN05_RULE, store),
        patch.object(interpreter, jax_.SWAP_RULE, swap),
        patch.object(interpreter, jax_.INLINE_RULE, inline),
        patch.object(callbacks, "copy_smem_to_gmem", copy),
        patch.object(jax_.Barrier, "deallocate", end),
        jax_.interpret_mode(jax_.InterpretParams(detect_races=races)),
    ):
        yield
    if races and jax_.get_races().races_found:
        raise Raced
