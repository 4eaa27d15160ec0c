"""The full-size training step, compiled for a pod topology by libtpu."""

from collections import Counter

from infinitevl_jax.config.presets import load_preset
from infinitevl_jax.train.pods import collectives, compile_step, of_rows
from pallas_kernels.testing.hlo import work
from pallas_kernels.testing.pods import HBM


def test_collectives_are_counted_in_any_form():
    text = (
        "%a = bf16[2048,11008]{1,0:T(8,128)} all-gather(%x)\n%b = (f32[1,8192,16]{2,1,0},"
        " bf16[8]{0}) all-reduce(%y, %z)\n%c = (bf16[1,8192,2048]{2,1,0},"
        ' bf16[64,8192,2048]{2,1,0}) all-gather-start(%x), metadata={op_name="all-to-all("}\n%d ='
        " bf16[2048,11008]{1,0} all-gather(%w)\n%e = bf16[18192,5]{1,0} collective-permute(%w)\n"
    )
    found = collectives(text)
    gathered = {
        ("all-gather", "bf16[2048,11008]"): 2,
        ("all-gather", "bf16[1,8192,2048]"): 1,
        ("all-gather", "bf16[64,8192,2048]"): 1,
    }
    others = {
        ("all-reduce", "f32[1,8192,16]"): 1,
        ("all-reduce", "bf16[8]"): 1,
        ("collective-permute", "bf16[18192,5]"): 1,
    }
    assert found == Counter(gathered | others)
    assert of_rows(found, 8192) == [
        "all-gather bf16[1,8192,2048]",
        "all-gather bf16[64,8192,2048]",
        "all-reduce f32[1,8192,16]",
    ]


def test_training_step_of_4b_fits_v6e_8x8():
    """Stage II, 64 rows of 8K tokens on 64 chips of 32 GB; mixers and MLPs train.

    benchmarks/pods.py also has images, which take a minute longer to compile, and the compiler's
    own tiles: smaller ones halve the time, and the step takes 0.3 % less memory.
    """
    small = {"xla_tpu_scoped_vmem_limit_kib": "8192"}
    preset = load_preset("paper_supervised", ["train.data.batch=64", "train.data.patches=0"])
    report, ran = compile_step("v6e:8x8", preset, small)
    assert (
        0.5e9 < report.arguments < 1.5e9
    )  # 3.4 B parameters in f32 with two moments and 1 B in bf16, over 64 chips
    assert report.peak < 0.5 * HBM["v6e"]
    norms = [line for line in ran if line.startswith("l2norm ")]
    assert norms and all(": products" in line for line in norms), norms
    assert all(": mosaic_tpu" in line for line in ran if line not in norms), ran
    # Two a parameter and token in the forward pass, its repetition (without the layers' last
    # product) and both gradients; the frozen head has no gradient of its table.
    matrices, last, head = 3.428e9, 36 * 11008 * 2048, 151936 * 2048
    products = 8192 * (8 * matrices - 2 * last + 6 * head)
    done = work(report.hlo)
    assert abs(done.flops / products - 1) < 0.01
    found = collectives(report.hlo)
    # Nothing of a row's length crosses chips. The table, also the head, is gathered once a step,
    # not by every chunk of the loss: that was 20 of 41 GB.
    assert of_rows(found, 8192) == []
    assert found["all-gather", "bf16[151936,2048]"] == 1
    assert sum(done.collectives.values()) < 22.5e9
