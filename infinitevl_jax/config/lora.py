"""LoRA: which linear layers get an adapter, and its size."""

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from infinitevl_jax.config.ranges import Folder, Name, check_patterns, check_ranges
from infinitevl_jax.errors import InfiniteVLError

Rank = Annotated[int, Meta(ge=1, le=1 << 16)]
Alpha = Annotated[float, Meta(gt=0, le=1e6)]
TARGETS = (r"layers\..*\.(q|k|v|g|o|gate|up|down)_proj",)


@dataclass(frozen=True)
class LoraConfig:
    """Adapters beside linear layers: y = x W + bias + scale (x A) B, with A [in, rank] and
    B [rank, out]. There is no dropout.

    Attributes:
      rank, alpha: scale is alpha / rank, with `use_rslora` alpha / sqrt(rank).
      targets: regular expressions. A linear layer has an adapter if one matches its whole dotted
        name, such as "layers.3.self_attn.q_proj".
      from_: "from" in the file; a PEFT folder whose adapter is trained on. It has the same rank,
        alpha and targets. None: a new adapter, which changes nothing before the first step.
    """

    rank: Rank = 64
    alpha: Alpha = 128.0
    targets: tuple[Name, ...] = TARGETS
    use_rslora: bool = False
    from_: Folder | None = None

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        check_ranges(self)
        if not self.targets:
            raise InfiniteVLError(
                "train.lora.targets is empty", f"list regular expressions, such as {TARGETS[0]!r}"
            )
        check_patterns(self.targets, "train.lora.targets")

    @property
    def scale(self) -> float:
        """Factor of the adapter's product."""
        return lora_scale(self.rank, self.alpha, self.use_rslora)


def lora_scale(rank: int, alpha: float, use_rslora: bool) -> float:
    """Factor of an adapter's product, as PEFT defines it."""
    return alpha / (rank**0.5 if use_rslora else rank)
