"""The projection: its portable implementation against float64, and the Hopper kernel as far as a
CPU goes (test_mosaic_gpu_interpreted.py interprets it)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dispatch import Dispatch, Refusal
from pallas_kernels.projection import projection, reference, xla
from pallas_kernels.projection.hopper import plan as plans
from pallas_kernels.projection.hopper import projection as hopper
from pallas_kernels.projection.hopper.plan import LEAST, MEMORY, ROWS, SHARED, Plan, choose
from pallas_kernels.projection.implementations import PROJECTION
from pallas_kernels.testing.cases import projection_case
from pallas_kernels.testing.cases.projection import PUBLISHED
from pallas_kernels.testing.parity import in_float64, rel_rms, with_gradients

EVERYTHING = {"bias": True, "residual": True, "norm": True}
NAMES = "x", "weight", "bias", "residual", "norm"


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("gated", (False, True))
def test_value_and_gradients(gated, transposed):
    case = projection_case("", 3, 24, 10, gated, transposed, **EVERYTHING)
    inputs = [np.float32(case.make().inputs[name]) for name in NAMES]
    cotangent = np.float32(np.random.default_rng(1).standard_normal((3, 10)))

    def run(function):
        return with_gradients(lambda *a: (function(*a, eps=1e-6, transposed=transposed),))

    got = run(xla.projection)(inputs, (cotangent,))
    want = in_float64(run(reference.projection))(inputs, (cotangent,))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert rel_rms(a, b) <= 1e-5


def test_without_anything_it_is_a_product():
    x, weight = (jnp.asarray(np.random.default_rng(0).normal(size=s)) for s in ((2, 5), (5, 3)))
    np.testing.assert_allclose(projection(x, weight), x @ weight, rtol=1e-5)
    gated = projection(x, jnp.stack([weight, 2 * weight], 1), bias=jnp.ones((2, 3)))
    np.testing.assert_allclose(gated, jax.nn.silu(x @ weight + 1) * (2 * x @ weight + 1), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": (5, 4)}, r"weight is \[8, 6\]\n  -> give it \[4, 6\]"),
        ({"bias": (5,)}, r"bias is \[5\]\n  -> give it \[6\]"),
        ({"residual": (2, 8)}, r"residual is \[2, 8\]\n  -> give it \[2, 6\]"),
        ({"norm": (6,)}, r"norm is \[6\]\n  -> give it \[8\]"),
        ({"x": (2, 1, 8)}, r"x is \[2, 1, 8\] and weight .*\n  -> give x \[rows, K\]"),
    ],
)
def test_shapes_that_do_not_fit(change, words):
    shapes = {"x": (2, 8), "weight": (8, 6)} | change
    with pytest.raises(ValueError, match=words):
        projection(**{name: jnp.zeros(shape) for name, shape in shapes.items()})


def shaped(rows, inputs, outputs, *, dtype=jnp.bfloat16, norm=False, bias=False, residual=False,
           gated=False, transposed=False):  # fmt: skip
    pair = (2,) if gated else ()
    weight = (*pair, outputs, inputs) if transposed else (inputs, *pair, outputs)
    given = {"x": (rows, inputs), "weight": weight}
    given |= {"bias": (*pair, outputs)} if bias else {}
    given |= {"residual": (rows, outputs)} if residual else {}
    given |= {"norm": (inputs,)} if norm else {}
    return {name: jax.ShapeDtypeStruct(s, dtype) for name, s in given.items()}, transposed


@pytest.mark.parametrize(("name", "rows"), [*((name, 16) for name in PUBLISHED), ("down", 1)])
def test_published_sizes_lower_for_cuda(name, rows):
    inputs, outputs, around = PUBLISHED[name]
    arrays, transposed = shaped(rows, inputs, outputs, **around)
    run = jax.jit(lambda a: hopper.projection(**a, transposed=transposed))
    text = run.trace(arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1
    assert f"tensor<{rows}x{outputs}xbf16>" in text


@pytest.mark.parametrize("name", PUBLISHED)
def test_plans_of_the_published_sizes(name):
    """All multiprocessors work, shared memory has room, and enough is in flight to hide latency."""
    inputs, outputs, around = PUBLISHED[name]
    gated = around.get("gated", False)
    plan = choose(inputs, outputs, gated)
    tile = 2 * 64 * plan.rows * plan.blocks * (2 if gated else 1)
    for rows in (1, 8, 9, ROWS):
        kernel = hopper.Kernel(plan, rows, inputs, outputs, gated, 1e-6, False)
        arrays = [a for a in kernel.memory() if hasattr(a, "dtype")]
        used = sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in arrays[:5])
        assert used <= (SHARED if rows <= 8 else MEMORY)  # two share a multiprocessor
        assert plan.stages(rows, inputs, gated) * tile >= 2 * LEAST
        assert kernel.clusters * plan.splits >= 128
        assert kernel.steps * plan.rows * plan.splits == inputs


def test_plans_depend_on_the_matrix_alone():
    assert "rows" not in plans.choose.__annotations__


def test_refuses_by_name():
    def reason(rows=2, inputs=2048, outputs=128, dtype=jnp.bfloat16, **around):
        arrays, transposed = shaped(rows, inputs, outputs, dtype=dtype, **around)
        return hopper.supports(**arrays, transposed=transposed)

    assert reason() is None and reason(gated=True, transposed=True, norm=True) is None
    assert reason(rows=17) == "17 rows: 1 to 16" and reason(rows=0) == "0 rows: 1 to 16"
    assert reason(dtype=jnp.float32) == "x of float32: bfloat16 only"
    assert reason(outputs=100) == "100 columns: a multiple of 64"
    assert reason(inputs=333) == "333 inputs: a multiple of 64, at least 512"
    assert reason(inputs=448) == "448 inputs: a multiple of 64, at least 512"
    assert reason(inputs=64 * 1021) == "65344 inputs in 16 rows: shared memory has no room"
    arrays, _ = shaped(2, 448, 64)
    with pytest.raises(ValueError, match="448 inputs.*\n  -> use the implementation xla"):
        hopper.projection(**arrays)
    arrays, _ = shaped(2, 512, 64)
    with pytest.raises(ValueError, match="512 inputs: a multiple of 512, at least 2048"):
        hopper.projection(**arrays, plan=Plan(128, 1, 2**16, 4, 32))


def test_dispatch_says_why():
    class Hopper:
        platform, compute_capability, device_kind = "gpu", "9.0", "H100"

    kernel_first = Dispatch(PROJECTION, Hopper, "mosaic_gpu,xla")
    choice, reasons = kernel_first.choose(**shaped(17, 512, 64)[0])
    assert choice.name == "xla" and reasons == ["mosaic_gpu: 17 rows: 1 to 16"]
    assert kernel_first.choose(**shaped(16, 512, 64)[0])[0].name == "mosaic_gpu"
    unnamed = Dispatch(PROJECTION, Hopper)
    assert unnamed.choose(**shaped(8, 512, 64)[0])[0].name == "mosaic_gpu"
    choice, reasons = unnamed.choose(**shaped(9, 512, 64)[0])  # both take it
    assert choice.name == "xla" and reasons == ["mosaic_gpu: 9 rows: not timed beyond 8"]
    with pytest.raises(Refusal, match="mosaic_gpu: for Hopper GPUs, this is cpu"):
        projection(jnp.ones((1, 512)), jnp.ones((512, 64)), implementation="mosaic_gpu")
