"""Attention for TPU, compiled by libtpu for four generations of the chip, forward and backward, at
the sizes of the model. test_attention_tpu_scores.py compiles the language layer."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels.attention import Mask
from pallas_kernels.attention.tpu import attention as attention_tpu
from pallas_kernels.testing.pods import compile_for_pod, pod_mesh

TOPOLOGIES = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]


def compiled(
    topology, mask, tokens, keys, heads, width, segments, dtype=jnp.bfloat16, gradients=True
):
    mesh = Mesh(pod_mesh(topology, {"data": -1}).devices[:1], ("data",))  # one chip
    alike = NamedSharding(mesh, PartitionSpec())

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((1, *shape), dtype, sharding=alike)

    def run(q, k, v, q_token_index, k_token_index, d_out, d_lse):
        packed = (q_token_index, k_token_index) if segments else (None, None)

        def op(q, k, v):
            return attention_tpu.attention(
                q, k, v, q_token_index, k_token_index, *packed, mask, width**-0.5
            )

        if not gradients:
            return op(q, k, v)
        outputs, pull = jax.vjp(op, q, k, v)
        return outputs, pull((d_out, d_lse))

    q, k = array(tokens, heads[0], width), array(keys, heads[1], width)
    indices = array(tokens, dtype=jnp.int32), array(keys, dtype=jnp.int32)
    return compile_for_pod(
        run, mesh, q, k, k, *indices, q, array(tokens, heads[0], dtype=jnp.float32)
    )


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_vision_tower(topology):
    compiled(topology, Mask(False, window=64, aligned=True), 4096, 4096, (16, 16), 80, True)


def test_frame_over_a_ring():
    compiled("v6e:2x2", Mask(window=8192), 256, 8192, (16, 2), 128, False, gradients=False)


def test_float32_packed_sinks():
    mask = Mask(window=1024, sinks=256, aligned=True)
    compiled("v5e:2x2", mask, 4096, 4096, (4, 2), 128, True, dtype=jnp.float32)


def test_over_a_mesh():
    """Sequences and heads spread, each chip with the kernels on its own, under shard_map's own
    checks."""
    mesh = pod_mesh("v5p:2x2x1", {"data": 2, "tensor": 2})
    spec = PartitionSpec("data", None, "tensor")
    q, k = (
        jax.ShapeDtypeStruct(
            (2, 1024, heads, 128), jnp.bfloat16, sharding=NamedSharding(mesh, spec)
        )
        for heads in (16, 2)
    )
    token_index = jax.ShapeDtypeStruct(
        (2, 1024), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )

    def local(q, k, v, token_index):
        return attention_tpu.attention(
            q, k, v, token_index, token_index, None, None, Mask(window=512, aligned=True), 0.1
        )

    def run(q, k, v, token_index):
        specs = (spec, spec, spec, PartitionSpec("data"))
        op = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(spec, spec))
        outputs, pull = jax.vjp(lambda *x: op(*x, token_index), q, k, v)
        return pull(outputs)

    compile_for_pod(run, mesh, q, k, k, token_index)
