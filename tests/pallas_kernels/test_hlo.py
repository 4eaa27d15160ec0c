"""Work counted in a compiled TPU program: loops, products, collectives, bytes."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.testing.hlo import work
from pallas_kernels.testing.pods import compile_for_pod, pod_mesh

LAYERS, ROWS, WIDTH = 12, 1024, 512


def layers(x, weights):
    """Products in a scan inside a scan, 3 x 4 of them."""

    def one(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(partial(jax.lax.scan, one), x, weights.reshape(3, 4, WIDTH, WIDTH))[0]


def test_a_program_of_four_chips():
    mesh = pod_mesh("v5e:2x2", {"fsdp": 4})

    def shape(sizes, *axes):
        place = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=place)

    x = shape((ROWS, WIDTH), "fsdp")
    weights = shape((LAYERS, WIDTH, WIDTH), None, "fsdp")
    out = jax.sharding.NamedSharding(mesh, PartitionSpec("fsdp"))
    found = work(compile_for_pod(layers, mesh, x, weights, text=True, out_shardings=out).hlo)
    assert found.flops == LAYERS * 2 * ROWS * WIDTH**2 / 4
    assert found.collectives == {"all-gather": LAYERS * WIDTH**2 * 2}
    # its part of the weights is read once, rows come and go; all else may stay on the chip
    least = LAYERS * WIDTH**2 * 2 / 4 + 2 * ROWS * WIDTH * 2 / 4
    assert least <= found.bytes <= 2 * least + LAYERS * WIDTH**2 * 2


TEXT = """
HloModule step

%body (p: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %p = (s32[], bf16[8,64]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8,64]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %start = (bf16[8,64], bf16[32,64]{1,0}) all-gather-start(%x), channel_id=7
  %done = bf16[32,64]{1,0} all-gather-done(%start)
  %near = bf16[32,64]{1,0:T(8,128)S(1)} copy(%done)
  %y = bf16[8,64] fusion(%near), kind=kOutput, calls=%inner
  ROOT %t = (s32[], bf16[8,64]) tuple(%i, %y)
}

%inner (q: bf16[32,64]) -> bf16[8,64] {
  %q = bf16[32,64] parameter(0)
  %k = bf16[64,64] constant({...})
  %s = bf16[8,64] dynamic-slice(%q, %k), dynamic_slice_sizes={8,64}
  ROOT %c = bf16[8,64] convolution(%s, %k), dim_labels=bf_io->bf
}

%ends (r: (s32[], bf16[8,64])) -> pred[] {
  %n = s32[] constant(5)
  %r = (s32[], bf16[8,64]) parameter(0)
  %j = s32[] get-tuple-element(%r), index=0
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

ENTRY %main (a: bf16[8,64]) -> bf16[8,64] {
  %a = bf16[8,64] parameter(0)
  %zero = s32[] constant(0)
  %in = (s32[], bf16[8,64]) tuple(%zero, %a)
  %loop = (s32[], bf16[8,64]) while(%in), condition=%ends, body=%body
  %b = bf16[8,64] get-tuple-element(%loop), index=1
  ROOT %sum = bf16[8,64] all-reduce(%b), channel_id=8, to_apply=%add
}
"""


def test_a_program_by_hand():
    found, array = work(TEXT), 8 * 64 * 2
    assert found.flops == 5 * 2 * 8 * 64 * 64
    assert found.collectives == {"all-gather": 5 * 4 * array, "all-reduce": array}
    # the gather reads one part and writes four, the copy reads those, the fusion writes one
    assert found.bytes == 5 * (array + 4 * array + 4 * array + array) + 2 * array


@pytest.mark.parametrize("text", ["", TEXT.replace("constant(5)", "parameter(1)")])
def test_what_cannot_be_counted_is_refused(text):
    with pytest.raises(ValueError, match="no entry|number of trips"):
        work(text)
