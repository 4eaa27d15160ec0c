"""The full-size training step compiled for a real pod topology, here, by libtpu's compiler."""

from benchmarks.pods import compile_step, gathered
from pallas_kernels.testing.pods import HBM


def test_gathers_are_counted_in_any_form():
    plain = "%a = bf16[2048,11008]{1,0:T(8,128)} all-gather(%x)\n%b = f32[1,8192,16]{2,1,0} all-gather(%y)\n"
    started = "%c = (bf16[1,8192,2048]{2,1,0}, bf16[64,8192,2048]{2,1,0}) all-gather-start(%x)\n"
    assert gathered(plain + started, 8192) == (3, 2)


def test_training_step_of_4b_fits_v6e_8x8():
    """64 rows of 8K tokens, all but tower and embeddings training: 64 chips of 32 GB, a row each. (With images, a minute longer to
    compile: benchmarks/pods.py.)"""
    report, ran = compile_step("v6e:8x8", patches=0)
    assert 0.5e9 < report.arguments < 1.5e9  # 3.4 B parameters in f32 with two moments and 1 B in bf16, over 64 chips
    assert report.peak < 0.5 * HBM["v6e"]
    assert all(": mosaic_tpu" in line for line in ran), ran
    parameters, activations = gathered(report.hlo, 8192)
    assert parameters and not activations  # queries, keys and values stay where their row is
