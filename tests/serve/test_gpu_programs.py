"""What XLA makes of serving programs for an H100: kernels a layer, layouts and copies.

That needs packages that .ci/run installs for its second environment. Elsewhere each program must be
refused by the name of what is missing, and nothing passes for having been compiled.
"""

import re
from math import prod

import numpy as np
import pytest

from benchmarks.gpu_programs import Compiler, published, table
from infinitevl_jax.config.model import LINEAR
from infinitevl_jax.config.run import OpsConfig
from infinitevl_jax.nn.mixers.gated_delta_net import GatedDeltaNet
from infinitevl_jax.nn.ops import Ops
from pallas_kernels.testing.gpu_programs import launches, refusal

HLO = """
HloModule jit_f, is_scheduled=true

%fused_add (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %add.1 = f32[4]{0} add(%a, %a), metadata={op_name="jit(f)/add"}
}

ENTRY %main.2 (x: f32[4]) -> (f32[4]) {
  %x = f32[4]{0} parameter(0)
  %loop_add_fusion = f32[4]{0} fusion(%x), calls=%fused_add, metadata={op_name="jit(f)/add"}
  %call.1 = (f32[4]{0}, bf16[2]{0}) custom-call(%x), custom_call_target="mosaic_gpu_v2"
  %gte = f32[4]{0} get-tuple-element(%call.1), index=0
  ROOT %tuple.1 = (f32[4]{0}) tuple(%gte)
}
"""


def compiled(layers, run, projection=None):
    """The launches of what `run(compiler)` compiles, or None where it is refused."""
    reason, ops = refusal(), OpsConfig(projection=projection)
    try:
        return run(Compiler(published(layers, blocks=1), ops))
    except RuntimeError as error:
        assert reason and f"cannot compile for an H100: {reason}\n  -> install" in str(error)
    return None


def numbers(result: str) -> int:
    """Of a launch's first result."""
    found = re.search(r"\w+\[([\d,]*)\]", result)
    assert found
    return prod(map(int, found[1].split(","))) if found[1] else 1


def test_launches_are_read_from_a_program():
    first, second = launches(HLO)
    assert first == ("loop_add_fusion", "fusion", "f32[4]{0}", "jit(f)/add")
    assert second[:3] == ("call.1", "mosaic_gpu_v2", "(f32[4]{0}, bf16[2]{0})")
    assert table([first, second]).startswith("2 kernels or calls\n  loop_add_fusion ")


@pytest.mark.parametrize(
    ("rows", "projection", "most"), [(1, None, 41), (8, None, 40), (1, "xla", 91)]
)
def test_a_decoding_step(rows, projection, most):
    """The first period of layers and the head: no more kernels than there were."""
    found = compiled(4, lambda compiler: launches(compiler.decode(rows)), projection)
    if found:
        kernels = [launch for launch in found if launch.kind == "mosaic_gpu_v2"]
        assert len(kernels) == 2 + 3 + (0 if projection else 4 * 4 + 1)
        assert len(found) <= most, table(found)


def test_a_prompt():
    """A Gated DeltaNet layer reads its joint projection in place: in the order of tokens, without
    copies of it."""
    found = compiled(2, lambda compiler: launches(compiler.prefill(8192)))
    if found:
        assert any(launch.result == "bf16[8192,12352]{1,0}" for launch in found), table(found)
        copies = [
            launch
            for launch in found
            if re.search("concatenate|transpose|copy|pad", launch.name)
            and numbers(launch.result) >= 8192 * 1024
            and "/mixer/concatenate" not in launch.origin  # of rotary halves
        ]
        assert not copies, table(copies)


def test_a_frame():
    """The tower's joint matrices are not put together for each frame."""
    found = compiled(1, lambda compiler: [launches(hlo) for hlo in compiler.frame()])
    if found:
        tower, decoder = found
        assert sum(launch.kind == "mosaic_gpu_v2" for launch in tower) == 1
        assert not any("concatenate" in x.name and numbers(x.result) > 10**6 for x in tower)
        assert any("attention_forward" in launch.origin for launch in decoder)


def test_kernels_find_the_parts_of_a_joint_projection_where_they_can_read_them():
    """At multiples of 256 bytes, but for the narrow ones at the end, which are cast."""
    config = published(2, blocks=1).text
    assert config.layer_types[1] == LINEAR
    layer = GatedDeltaNet(config, Ops())
    widths = [
        getattr(layer, name).kernel.get_value().shape[1] for name in GatedDeltaNet.input_proj.names
    ]
    starts = np.cumsum([0, *widths])
    assert all(start * 2 % 256 == 0 for start in starts[:5])
