"""A new implementation of an operator and of its one-token step, registered from here alone."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infinitevl_jax.config.run import OpsConfig, RunConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.ops import resolve_ops
from infinitevl_jax.sharding import make_mesh
from pallas_kernels.attention import KVCache, Mask, attention, attention_step, step, xla
from pallas_kernels.attention.implementations import ATTENTION, ATTENTION_STEP
from pallas_kernels.dispatch import Implementation, Refusal
from pallas_kernels.hardware import hopper
from pallas_kernels.operators import OPERATORS


def toy_supports(q, k, v, *others, mask, **named):
    return "sinks" if mask.sinks else None


def toy_attention(q, k, v, *args, **kwargs):
    out, lse = xla.attention(q, k, v, *args, **kwargs)
    return out + 1, lse


def toy_step(*args, **kwargs):
    out, kv_cache = step.step(*args, **kwargs)
    return out + 1, kv_cache


@pytest.fixture
def toys(monkeypatch):
    """The two of them, until the test ends."""
    for operator in (ATTENTION, ATTENTION_STEP):
        monkeypatch.setattr(operator, "implementations", operator.implementations)
    ATTENTION.register(Implementation("toy", toy_attention, supports=toy_supports))
    wide = lambda q, *others, **named: "16 wide" if q.shape[2] == 16 else None  # noqa: E731
    ATTENTION_STEP.register(Implementation("toy", toy_step, supports=wide), before="xla")


def arrays(width=8):
    rng = np.random.default_rng(0)
    q, k, v = (np.float32(rng.normal(size=(2, 5, heads, width))) for heads in (4, 2, 2))
    cache = KVCache(*(jnp.float32(rng.normal(size=(2, 8, 2, width))) for _ in range(2)))
    return q, k, v, cache


def test_it_is_chosen_refused_with_its_reason_and_reported(toys):
    ops, (q, k, v, cache) = resolve_ops(), arrays()
    plain, _ = xla.attention(q, k, v)
    np.testing.assert_array_equal(ops.attention(q, k, v)[0], plain + 1)
    np.testing.assert_array_equal(
        ops.attention(q, k, v, mask=Mask(sinks=2, window=1))[0],
        xla.attention(q, k, v, mask=Mask(sinks=2, window=1))[0],
    )
    token = q[:, 0], k[:, 0], v[:, 0], cache, np.int32([3, 4])
    np.testing.assert_array_equal(ops.attention_step(*token)[0], step.step(*token)[0] + 1)
    first, second, third = ops.report()
    assert first.startswith(
        "attention of float32[2, 5, 4, 8], float32[2, 5, 2, 8]"
    ) and first.endswith("on cpu: toy")
    assert "on cpu: xla (toy: sinks; mosaic_tpu: for TPUs" in second
    assert (
        third.startswith("attention_step of float32[2, 4, 8]")
        and "toy (mosaic_gpu: for Hopper" in third
    )


def test_it_runs_by_name_or_fails(toys):
    q, k, v, cache = arrays(16)
    assert (attention(q, k, v, implementation="toy")[0] == xla.attention(q, k, v)[0] + 1).all()
    assert (attention(q, k, v, implementation="xla")[0] == xla.attention(q, k, v)[0]).all()
    with pytest.raises(Refusal, match="attention cannot run on .*: toy: sinks"):
        attention(q, k, v, mask=Mask(sinks=1), implementation="toy")
    with pytest.raises(Refusal, match="attention_step cannot run on .*: toy: 16 wide"):
        attention_step(q[:, 0], k[:, 0], v[:, 0], cache, np.int32([3, 4]), implementation="toy")
    with pytest.raises(InfiniteVLError, match="attention cannot run on .*: toy: sinks"):
        resolve_ops(None, OpsConfig(attention="toy")).attention(q, k, v, mask=Mask(sinks=1))


def test_it_is_partitioned_as_the_others_are(toys):
    """By the operator's own rule: it knows nothing of meshes."""
    q, k, v, _ = arrays()
    ops = resolve_ops(make_mesh(RunConfig(fsdp=2, tensor=4)))
    np.testing.assert_allclose(
        jax.jit(ops.attention)(q, k, v)[0], xla.attention(q, k, v)[0] + 1, atol=1e-6
    )
    assert any("float32[1, 5, 1, 8]" in line and line.endswith("toy") for line in ops.report())


def test_it_is_gone_afterwards():
    """Records that were resolved before are the same again."""
    assert [i.name for i in ATTENTION.implementations] == ["mosaic_tpu", "mosaic_gpu", "xla"]
    with pytest.raises(InfiniteVLError, match="attention has no implementation 'toy'"):
        resolve_ops(None, OpsConfig(attention="toy"))
    assert resolve_ops() is resolve_ops() and resolve_ops() is resolve_ops(None, OpsConfig())


def test_a_device_may_be_the_reason(toys):
    ATTENTION.register(
        Implementation("blackwell", toy_attention, lambda device: "for Blackwell GPUs"),
        before="mosaic_gpu",
    )
    names = [i.name for i in ATTENTION.implementations]
    assert names == ["toy", "mosaic_tpu", "blackwell", "mosaic_gpu", "xla"]
    with pytest.raises(
        InfiniteVLError, match="attention cannot run as asked: blackwell: for Blackwell GPUs"
    ):
        resolve_ops(None, OpsConfig(attention="blackwell"))
    assert hopper(SimpleNamespace(platform="gpu", compute_capability="10.0", device_kind="B200"))


def test_registering_is_checked(toys):
    with pytest.raises(ValueError, match="attention has an implementation 'toy' already"):
        ATTENTION.register(Implementation("toy", toy_attention))
    with pytest.raises(
        Refusal, match="attention has no implementation 'nobody'\n  -> choose among toy, mosaic_tpu"
    ):
        ATTENTION.register(Implementation("other", toy_attention), before="nobody")


def test_optional_arguments_are_optional():
    """Without ordinals, segments, mask and scale: causal attention of full rows."""
    q, k, v, cache = arrays()
    index, zeros = jnp.tile(jnp.arange(5), (2, 1)), jnp.zeros((2, 5), jnp.int32)
    for found, want in zip(
        attention(q, k, v),
        xla.attention(q, k, v, index, index, zeros, zeros, Mask(), 8**-0.5),
        strict=True,
    ):
        np.testing.assert_array_equal(found, want)
    token = q[:, 0], k[:, 0], v[:, 0], cache, np.int32([3, 4])
    for found, want in zip(
        jax.tree.leaves(attention_step(*token)),
        jax.tree.leaves(step.step(*token, None, 8**-0.5)),
        strict=True,
    ):
        np.testing.assert_array_equal(found, want)


def test_every_operator_has_a_portable_implementation():
    for operator in OPERATORS:
        (portable,) = [i for i in operator.implementations if i.name == "xla"]
        assert portable.device(jax.devices()[0]) is None
