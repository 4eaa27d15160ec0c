"""The cells of the parity matrix: one for each case, implementation and dtype."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from pallas_kernels.attention.implementations import ATTENTION, ATTENTION_STEP
from pallas_kernels.dispatch import Implementation
from pallas_kernels.gated_delta_rule.implementations import GATED_DELTA_RULE, GATED_DELTA_RULE_STEP
from pallas_kernels.projection.implementations import PROJECTION
from pallas_kernels.short_conv.implementations import SHORT_CONV
from pallas_kernels.testing import cudnn_attention
from pallas_kernels.testing.cases import CASES, RESULTS, Case
from pallas_kernels.testing.steps import implementation_in_a_row

IMPLEMENTATIONS = {
    "attention": (*ATTENTION.implementations, cudnn_attention.CUDNN),
    "gated_delta_rule": GATED_DELTA_RULE.implementations,
    "attention_step": tuple(map(implementation_in_a_row, ATTENTION_STEP.implementations)),
    "gated_delta_rule_step": tuple(
        map(implementation_in_a_row, GATED_DELTA_RULE_STEP.implementations)
    ),
    "projection": PROJECTION.implementations,
    "short_conv": SHORT_CONV.implementations,
}
ALLOWED = {name: 5e-3 for results in RESULTS.values() for name in results}
ALLOWED |= {
    f"d_{name}": 8e-3 for name in ("q", "k", "v", "initial_state", "x", "weight", "conv_state")
}
ALLOWED |= {"d_g": 2e-2, "d_beta": 2e-2}
"""Errors allowed in bfloat16. float32 may have 1e-4."""


class Cell(NamedTuple):
    """The errors of an implementation on a case, by name, or the reason it does not take it.

    differing: name of a result -> number of calls in which it differed from the first call.
    seconds: time of all calls; in the first cell of a case, of the reference too.
    """

    operator: str
    implementation: str
    case: str
    dtype: str
    errors: dict[str, float]
    allowed: dict[str, float]
    refusal: str | None
    repeats: int = 1
    differing: dict[str, int] = {}
    note: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.operator} {self.implementation} {self.dtype} {self.case}"

    @property
    def share(self) -> float:
        """The largest error as a share of what is allowed; NaN stays NaN."""
        shares = [error / self.allowed[name] for name, error in self.errors.items()]
        return float(np.max(shares)) if shares else 0.0

    @property
    def passed(self) -> bool:
        return bool(self.refusal) or self.share <= 1

    def __str__(self) -> str:
        found = f"no: {self.refusal}" if self.refusal else f"{self.share:5.2f} of what is allowed"
        shares = {
            n: np.nan_to_num(error / self.allowed[n], nan=np.inf)
            for n, error in self.errors.items()
        }
        worst = max(shares, key=shares.get) if shares else ""
        differing = ", ".join(f"{name} differs in {n}" for name, n in self.differing.items())
        differing = f" ({differing} of {self.repeats} calls)" if differing else ""
        return (
            f"{self.implementation:11} {self.dtype:9} {self.case:48} {found}"
            f" {worst}{differing}{self.note and ': '}{self.note}"
        )


class Group(NamedTuple):
    """The cells that share a problem."""

    operator: str
    case: Case
    dtype: str
    implementations: tuple[Implementation, ...]


def groups(
    operator: str, longest: int, wanted: Callable[[Implementation, str, str], bool]
) -> Iterator[Group]:
    """The cells of an operator's matrix for which `wanted(implementation, dtype, case name)`."""
    for case in CASES[operator](longest):
        for dtype in case.dtypes:
            if chosen := tuple(i for i in IMPLEMENTATIONS[operator] if wanted(i, dtype, case.name)):
                yield Group(operator, case, dtype, chosen)
