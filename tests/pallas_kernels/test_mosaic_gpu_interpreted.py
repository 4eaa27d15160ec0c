"""The kernels for Hopper GPUs, interpreted on a CPU with races detected: in processes of their own,
with threads enough for their blocks.

JAX 0.11.2 alone can do that (Python 3.12: .ci/run); with others the matrix must say so, and nothing
passes for having run.
"""

import os
import subprocess
import sys
import textwrap

import jax
import pytest

from pallas_kernels.testing.jax_private import VERSION
from pallas_kernels.testing.mosaic_gpu_interpreter import THREADS, refusal

CASES = {
    "attention": "^(window, 300 x (64|128)|packed|ring, 65 x 128|tower, windows)",
    "gated_delta_rule": "^(packed, 300|pads|gates spread, 65|gates mild, repeated|no initial)",
    "attention_step": "^(short|two|window of 100|one key)",
    "gated_delta_rule_step": "^(one head|joint projection, one)",
    "projection": "^(in four|a last piece|before|gated, two|transposed, 5)",
    "short_conv": "^(few|pads|packed, 130|joint, p)",
}
CUT = """
    from pallas_kernels.testing import matrix
    from pallas_kernels.gated_delta_rule.tuning import HopperSpans as spans

    spans.row, spans.shortest, spans.most = 2, 1, {most}
    matrix.main()
"""
SEVERAL = """
    from pallas_kernels.testing import matrix
    from pallas_kernels.gated_delta_rule.hopper import gradients

    gradients.HOPPER_MULTIPROCESSORS = 3  # blocks: each takes several chunks in turn
    matrix.main()
"""
ROWS = """
    import jax, jax.numpy as jnp, numpy as np
    from pallas_kernels.projection.hopper.plan import Plan
    from pallas_kernels.projection.hopper.projection import projection
    from pallas_kernels.testing.mosaic_gpu_interpreter import interpreted

    rng = np.random.default_rng(0)
    x, weight, residual, norm = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((9, 1024), (1024, 192), (9, 192), (1024,))
    )
    x = x.at[1].set(jnp.nan)
    plan = Plan(rows=128, blocks=1, flight=48 * 1024, splits=2, clusters=1)

    def run(*rows):
        with interpreted():
            return np.asarray(
                jax.block_until_ready(
                    projection(x[*rows,], weight, None, residual[*rows,], norm, plan=plan)
                ),
                np.float32,
            )

    many, few, one = run(slice(0, 9)), run(slice(2, 5)), run(slice(8, 9))
    assert np.isnan(many[1]).all() and np.isfinite(many[2:]).all()
    np.testing.assert_array_equal(many[2:5], few)
    np.testing.assert_array_equal(many[8:], one)
    wide = np.asarray(x[2:], np.float64)
    want = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + 1e-6) * np.asarray(norm, np.float64)
    want = want @ np.asarray(weight, np.float64) + np.asarray(residual[2:], np.float64)
    assert np.sqrt(np.mean((many[2:] - want) ** 2) / np.mean(want**2)) < 5e-3
    print("equal")
"""
ALONE = """
    import jax, jax.numpy as jnp
    from pallas_kernels.projection.hopper import projection as kernel
    from pallas_kernels.projection.hopper.plan import Plan
    from pallas_kernels.testing.mosaic_gpu_interpreter import Raced, interpreted

    kernel.cluster_arrive = kernel.cluster_wait = lambda: None
    x, weight = jnp.ones((1, 1024), jnp.bfloat16), jnp.ones((1024, 64), jnp.bfloat16)
    try:
        with interpreted():
            jax.block_until_ready(
                kernel.projection(x, weight, plan=Plan(128, 1, 48 * 1024, 2, 1))
            )
    except Raced:
        print("raced")
"""
DECODING = """
    import jax, jax.numpy as jnp, numpy as np
    from infinitevl_jax.config.model import LINEAR, SLIDING, ModelConfig, TextConfig
    from infinitevl_jax.inputs.model_inputs import text_inputs
    from infinitevl_jax.nn.cache import empty
    from infinitevl_jax.nn.fuse import fuse
    from infinitevl_jax.nn.ops import Ops
    from infinitevl_jax.nn.params import functional, initialize
    from pallas_kernels.projection.hopper.projection import projection
    from pallas_kernels.testing.mosaic_gpu_interpreter import interpreted

    wide = {"hidden_size": 512, "intermediate_size": 512, "vocab_size": 64, "sliding_window": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128}
    text = TextConfig((SLIDING, LINEAR), num_linear_heads=2, mrope_section=None, **wide, **heads)
    config = ModelConfig(text, None, family="qwen2", initializer_range=0.5)
    rng, params = np.random.default_rng(0), initialize(config, jax.random.key(0), scanned=False)
    for name, p in params.items():
        noise = 0.4 * rng.normal(size=p.shape) if name.endswith(("norm.weight", "bias")) else 0
        params[name] = jnp.asarray(p + noise, jnp.bfloat16)
    params, called = fuse(config, params), []

    def logits(run):
        ops = Ops(projection=lambda *x, **y: called.append(run) or run(*x, **y))
        vlm = functional(config, scanned=False, dtype=jnp.bfloat16, ops=ops)(params)
        inputs = text_inputs(np.array([[5], [6], [7]]))
        cache = empty(vlm.cache_spec(3, None))
        out = vlm.step(vlm.embed(inputs, None), inputs, cache)[0]
        return np.float32(jax.block_until_ready(out))

    with interpreted():
        found = logits(projection)
    want = logits(Ops().projection)
    assert called.count(projection) == 4 * 2 + 1 and np.std(want) > 1
    assert np.sqrt(np.mean((found - want) ** 2) / np.mean(want**2)) < 1e-2
    print("equal")
"""
RACE = """
    import jax, jax.numpy as jnp
    import jax.experimental.pallas.mosaic_gpu as plgpu
    from pallas_kernels.testing.mosaic_gpu_interpreter import Raced, interpreted

    def kernel(x_ref, out_ref):
        out_ref[...] = x_ref[...] + jax.lax.axis_index("group")

    try:
        with interpreted():
            x = jnp.zeros((128, 128))
            add = plgpu.kernel(kernel, out_type=x, num_threads=2, thread_name="group")
            jax.block_until_ready(add(x))
    except Raced:
        print("raced")
"""


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"NPROC": str(2 * THREADS)},
        capture_output=True,
        text=True,
    )


def check(done):
    """Either every case ran and passed, or the reason stands in each line."""
    _, *lines = (line for line in done.stdout.splitlines() if " float32 " not in line)
    assert lines, done.stderr
    if jax.__version_info__ == VERSION:
        assert done.returncode == 0, done.stdout + done.stderr
        assert all("of what is allowed" in line for line in lines), lines
    else:
        assert "nothing ran" in done.stderr
        assert all(
            "no: for Hopper GPUs; interpreted by JAX 0.11.2 alone, this is" in line
            for line in lines
        ), lines


@pytest.mark.parametrize("operator", CASES)
def test_parity(operator):
    matrix = "-m", "pallas_kernels.testing.matrix", "--implementation", "mosaic_gpu"
    check(python(*matrix, "--operator", operator, "--case", CASES[operator]))


@pytest.mark.parametrize("most", [2, 3, 8])
def test_parity_of_sequences_in_spans(most):
    arguments = (
        "--implementation",
        "mosaic_gpu",
        "--operator",
        "gated_delta_rule",
        "--case",
        "^packed, 300",
    )
    check(python("-c", textwrap.dedent(CUT.format(most=most)), *arguments))


def test_parity_of_several_chunks_a_block():
    arguments = (
        "--implementation",
        "mosaic_gpu",
        "--operator",
        "gated_delta_rule",
        "--case",
        "^packed, 300",
    )
    check(python("-c", textwrap.dedent(SEVERAL), *arguments))


@pytest.mark.parametrize(
    ("script", "word"),
    [(RACE, "raced"), (ALONE, "raced"), (ROWS, "equal"), (DECODING, "equal")],
    ids=["race", "race in a cluster", "rows of a projection", "a token of a model"],
)
def test_script(script, word):
    """Races are found, between the blocks of a cluster too. A row of a projection has the same bits
    whatever the number of rows and whatever is in the others. A token goes through the layers of a
    model as by `xla`."""
    done = python("-c", textwrap.dedent(script))
    if jax.__version_info__ == VERSION:
        assert word in done.stdout, done.stderr
    else:
        assert refusal() and done.returncode
