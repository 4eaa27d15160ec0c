"""Shares of a GPU's busy time, from launches written down by hand."""

from benchmarks.trace import Kernel, collective_share, covered


def kernel(name, start, us, device="GPU:0"):
    return Kernel(name, us, "", device, start)


def test_covered():
    assert covered([]) == 0
    assert (
        covered([kernel("a", 10, 5), kernel("b", 12, 1), kernel("c", 14, 4), kernel("d", 30, 2)])
        == 10
    )


def test_share_of_collectives():
    first = [
        kernel("gemm", 0, 60),
        kernel("ncclDevKernel_AllGather_RING_LL", 40, 40),
        kernel("loop_add_fusion", 90, 20),
    ]
    assert collective_share(first) == {"collectives": 0.4, "collectives_alone": 0.2}
    second = [kernel("gemm", 0, 50, "GPU:1"), kernel("AllReduceKernelImpl", 100, 50, "GPU:1")]
    assert collective_share(first + second) == {"collectives": 0.45, "collectives_alone": 0.35}
    assert collective_share([kernel("gemm", 0, 50)]) == {"collectives": 0, "collectives_alone": 0}
    assert collective_share([]) == {}
