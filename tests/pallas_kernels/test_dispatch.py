"""The choice of an implementation: by name or the first that can, with a report and reasons."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from infinitevl_jax.config.run import OpsConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.ops import resolve_ops
from pallas_kernels.attention import Mask
from pallas_kernels.attention.implementations import ATTENTION
from pallas_kernels.dispatch import Dispatch, Implementation, Operator
from pallas_kernels.hardware import hopper, tpu

CPU = jax.devices("cpu")[0]
HOPPER = SimpleNamespace(platform="gpu", device_kind="H100", compute_capability="9.0")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5p")
X = jnp.ones((2, 3), jnp.bfloat16)


def operator(*options):
    return Operator("op", lambda x: {"x": x}, lambda run, mesh: run, options)


def options():
    return (
        Implementation("elsewhere", lambda x: x + 1, hopper),
        Implementation(
            "narrow", lambda x: x + 2, supports=lambda x: "3 columns" if x.shape[1] == 3 else None
        ),
        Implementation("any", lambda x: x + 3),
    )


def test_the_first_that_can_runs_and_is_reported():
    op = Dispatch(operator(*options()), CPU)
    assert (op(X) == 4).all() and (op(X[:, :2]) == 3).all()
    first, second = op.report()
    assert (
        first
        == "op of bfloat16[2, 3] on cpu: any (elsewhere: for Hopper GPUs, this is cpu; narrow: 3"
        " columns)"
    )
    assert second.startswith("op of bfloat16[2, 2] on cpu: narrow (elsewhere")


def test_one_that_is_slower_runs_where_it_is_named_or_alone():
    slow = Implementation(
        "slow", lambda x: x + 1, slower=lambda x: "2 rows" if len(x) == 2 else None
    )
    both = operator(slow, Implementation("any", lambda x: x + 3))
    unnamed = Dispatch(both, CPU)
    assert (unnamed(X) == 4).all() and (unnamed(X[:1]) == 2).all()
    assert unnamed.report()[0] == "op of bfloat16[2, 3] on cpu: any (slow: 2 rows)"
    assert (Dispatch(both, CPU, "slow,any")(X) == 2).all()
    assert (Dispatch(operator(slow), CPU)(X) == 2).all()


def test_gradients_made_elsewhere_are_reported():
    op = Dispatch(operator(Implementation("half", lambda x: x, gradients_by=lambda x: "any")), CPU)
    op(X)
    assert op.report() == ["op of bfloat16[2, 3] on cpu: half, gradients by any"]


def test_a_name_runs_or_fails():
    assert (Dispatch(operator(*options()), CPU, "any")(X) == 4).all()
    # In the order given.
    assert (Dispatch(operator(*options()), CPU, "elsewhere,any,narrow")(X[:, :2]) == 4).all()
    with pytest.raises(
        ValueError,
        match=r"op cannot run on bfloat16\[2, 3\] on cpu: narrow: 3 columns\n  -> name another",
    ):
        Dispatch(operator(*options()), CPU, "narrow")(X)
    with pytest.raises(
        ValueError, match="op cannot run as asked: elsewhere: for Hopper GPUs, this is cpu"
    ):
        Dispatch(operator(*options()), CPU, "elsewhere")
    with pytest.raises(
        ValueError,
        match="op has no implementation 'fast'\n  -> choose among elsewhere, narrow, any",
    ):
        Dispatch(operator(*options()), CPU, "fast")


def test_all_refusals_are_told():
    with pytest.raises(
        ValueError, match="elsewhere: for Hopper.*; narrow: 3 columns\n  -> change the case"
    ):
        Dispatch(operator(*options()[:2]), CPU)(X)


def test_devices():
    assert hopper(HOPPER) is None and "A100" in hopper(
        SimpleNamespace(platform="gpu", device_kind="A100", compute_capability="8.0")
    )
    assert tpu(TPU) is None and "H100" in tpu(HOPPER)


def test_a_hopper_gpu_takes_its_kernel_where_it_can():
    q, k, rows = (
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((1, 8, 4, 128), X.dtype), ((1, 8, 2, 128), X.dtype), ((1, 8), jnp.int32))
    )
    case = q, k, k, rows, rows, None, None
    free = Dispatch(ATTENTION, HOPPER)
    assert free.choose(*case, mask=Mask(window=4, aligned=True), scale=0.1)[0].name == "mosaic_gpu"
    sinks = {"mask": Mask(window=4, sinks=1), "scale": 0.1}
    chosen, reasons = free.choose(*case, **sinks)
    assert chosen.name == "xla" and "mosaic_gpu: sinks outside the window" in reasons[-1]
    with pytest.raises(ValueError, match="mosaic_gpu: sinks outside the window"):
        Dispatch(ATTENTION, HOPPER, "mosaic_gpu").choose(*case, **sinks)


def test_a_hopper_gpu_takes_the_towers_heads():
    rows, rule = (
        jax.ShapeDtypeStruct((1, 8), jnp.int32),
        {"mask": Mask(causal=False, aligned=True), "scale": 0.1},
    )
    x = jax.ShapeDtypeStruct((1, 8, 2, 80), X.dtype)
    assert (
        Dispatch(ATTENTION, HOPPER).choose(x, x, x, rows, rows, rows, rows, **rule)[0].name
        == "mosaic_gpu"
    )


def test_operators_are_resolved_once_and_unknown_names_refused():
    assert resolve_ops() is resolve_ops()
    with pytest.raises(
        InfiniteVLError, match="gated_delta_rule has no implementation 'triton'\n  -> choose among"
    ):
        resolve_ops(None, OpsConfig(gated_delta_rule="triton"))
    with pytest.raises(
        InfiniteVLError, match="attention cannot run as asked: mosaic_tpu: for TPUs, this is cpu"
    ):
        resolve_ops(None, OpsConfig(attention="mosaic_tpu"))
