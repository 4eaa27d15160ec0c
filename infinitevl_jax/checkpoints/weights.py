"""The weight table: torch name <-> our name, one line a tensor, read in both directions.

Every torch tensor is used once and every parameter filled once; what does not fit is named. Only
three things differ between the two
sides: names, the order of axes (torch keeps [out, in], we keep [in, out]), and that equal layers
  are stacked here.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.nn.params import STACKED, abstract, stack_layouts

SAME, TURNED = False, True  # TURNED: [out, ...] -> [prod(...), out]

# torch name (published spelling), our name, axes. `*` is a layer's number, {a,b} stands for a line
# each.
TABLE: tuple[tuple[str, str, bool], ...] = (
    ("visual.patch_embed.proj.weight", "visual.patch_embed.kernel", TURNED),
    ("visual.blocks.*.{norm1,norm2}.weight", "visual.blocks.*.{norm1,norm2}.weight", SAME),
    ("visual.blocks.*.attn.{qkv,proj}.weight", "visual.blocks.*.attn.{qkv,proj}.kernel", TURNED),
    ("visual.blocks.*.attn.{qkv,proj}.bias", "visual.blocks.*.attn.{qkv,proj}.bias", SAME),
    (
        "visual.blocks.*.mlp.{gate,up,down}_proj.weight",
        "visual.blocks.*.mlp.{gate,up,down}_proj.kernel",
        TURNED,
    ),
    (
        "visual.blocks.*.mlp.{gate,up,down}_proj.bias",
        "visual.blocks.*.mlp.{gate,up,down}_proj.bias",
        SAME,
    ),
    ("visual.merger.ln_q.weight", "visual.merger.ln_q.weight", SAME),
    ("visual.merger.mlp.{0,2}.weight", "visual.merger.{fc1,fc2}.kernel", TURNED),
    ("visual.merger.mlp.{0,2}.bias", "visual.merger.{fc1,fc2}.bias", SAME),
    ("model.embed_tokens.weight", "embed_tokens.embedding", SAME),
    (
        "model.layers.*.{input,post_attention}_layernorm.weight",
        "layers.*.{input,post_attention}_layernorm.weight",
        SAME,
    ),
    (
        "model.layers.*.self_attn.{q,k,v,a,b,g,o}_proj.weight",
        "layers.*.self_attn.{q,k,v,a,b,g,o}_proj.kernel",
        TURNED,
    ),
    ("model.layers.*.self_attn.{q,k,v}_proj.bias", "layers.*.self_attn.{q,k,v}_proj.bias", SAME),
    (
        "model.layers.*.self_attn.{q,k,v}_conv1d.weight",
        "layers.*.self_attn.{q,k,v}_conv1d.weight",
        TURNED,
    ),
    ("model.layers.*.self_attn.{A_log,dt_bias}", "layers.*.self_attn.{A_log,dt_bias}", SAME),
    ("model.layers.*.self_attn.o_norm.weight", "layers.*.self_attn.o_norm.weight", SAME),
    (
        "model.layers.*.mlp.{gate,up,down}_proj.weight",
        "layers.*.mlp.{gate,up,down}_proj.kernel",
        TURNED,
    ),
    ("model.norm.weight", "norm.weight", SAME),
    ("lm_head.weight", "lm_head.kernel", TURNED),
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PUBLISHED, LIVE = "published", "live"
_LIVE = (("model.language_model.", "model."), ("model.visual.", "visual."))


def _lines(pattern: str) -> list[str]:
    """`a{b,c}d` -> [abd, acd]."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    return [
        "".join(choice)
        for choice in itertools.product(
            *(p.split(",") if i % 2 else [p] for i, p in enumerate(parts))
        )
    ]


_OURS: dict[str, tuple[str, bool]] = {
    ours: (torch, turned)
    for torch_pattern, our_pattern, turned in TABLE
    for torch, ours in zip(_lines(torch_pattern), _lines(our_pattern), strict=True)
}


def published(name: str) -> str:
    """A torch name in the published spelling, whichever of the two it came in."""
    return next((new + name.removeprefix(old) for old, new in _LIVE if name.startswith(old)), name)


def live(name: str) -> str:
    """A published torch name as transformers' live modules spell it."""
    return next((old + name.removeprefix(new) for old, new in _LIVE if name.startswith(new)), name)


@dataclass(frozen=True)
class Leaf:
    """One of our parameters, and the torch tensors that fill it.

    Attributes:
      name, shape: ours; a stacked leaf has a leading axis over `torch`.
      torch: published names, one for each slice.
      torch_shape: of each of them.
    """

    name: str
    shape: tuple[int, ...]
    torch: tuple[str, ...]
    torch_shape: tuple[int, ...]
    stacked: bool
    turned: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def slice(self, part: int) -> tuple:
        """Index of the part that torch tensor number `part` fills."""
        return (part,) if self.stacked else ()

    def to_torch(self, part: np.ndarray) -> np.ndarray:
        """One slice of ours -> the torch tensor."""
        return np.ascontiguousarray(part.T if self.turned else part).reshape(self.torch_shape)


def leaves(config: ModelConfig, *, scanned: bool) -> list[Leaf]:
    """Every parameter of a model in one layout, with the torch tensors behind it."""
    shapes = {
        name: tuple(leaf.shape) for name, leaf in abstract(config, scanned=scanned)[1].items()
    }
    layouts = stack_layouts(config, scanned=scanned)
    out = []
    for name, shape in shapes.items():
        layers, pattern, stacked = [None], name, False
        if found := STACKED.fullmatch(name):
            stack, group, place, tail = found.groups()
            where, stacked = layouts[stack], group == "blocks"
            layers = where.members(int(place)) if stacked else [where.stacked + int(place)]
            pattern = f"{stack}.*.{tail}"
        torch, turned = _OURS[pattern]
        one = shape[1:] if stacked else shape
        names = tuple(
            torch if layer is None else torch.replace("*", str(layer)) for layer in layers
        )
        out.append(
            Leaf(name, shape, names, _torch_shape(torch, one, turned, config), stacked, turned)
        )
    return out


def _torch_shape(
    torch: str, ours: tuple[int, ...], turned: bool, config: ModelConfig
) -> tuple[int, ...]:
    if torch == "visual.patch_embed.proj.weight":
        v = config.vision
        return (ours[1], v.in_channels, v.temporal_patch_size, v.patch_size, v.patch_size)
    if torch.endswith("_conv1d.weight"):
        return (ours[1], 1, ours[0])
    return ours[::-1] if turned else ours


def match(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Check that the tensors of a torch checkpoint are exactly those of the model.

    Args:
      shapes: published name -> shape. A tied lm_head may be there or not.

    Raises:
      InfiniteVLError: names what is missing, extra or misshapen.
    """
    expected = {
        name: leaf.torch_shape for leaf in leaves(config, scanned=False) for name in leaf.torch
    }
    if config.text.tie_word_embeddings and HEAD in shapes:
        expected[HEAD] = expected[EMBEDDING]
    complain(
        expected,
        shapes,
        source,
        f"config.json ({config.family}, {config.text.num_hidden_layers} layers)",
    )


def complain(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    source: str,
    what: str,
) -> None:
    """Raise InfiniteVLError with counts and the first few names unless both sides agree in names
    and shapes."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    lines = [
        f"\n  {len(names)} {kind}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for kind, names in (("missing", missing), ("extra", extra), ("misshapen", wrong))
        if names
    ]
    if lines:
        raise InfiniteVLError(
            f"the tensors of {source} are not those of {what}:" + "".join(lines),
            "every tensor has to be used once: take config.json and weights of the same model",
        )


def count(config: ModelConfig) -> int:
    """Parameters of the model; a tied head counts once."""
    return sum(math.prod(leaf.shape) for leaf in leaves(config, scanned=False))


def pieces(leaf: Leaf, index: Sequence[slice]) -> Iterator[tuple[int, tuple[slice, ...], str]]:
    """The torch tensors behind `leaf[index]`: (place along the leading axis of the result, index
    into one slice, published name)."""
    if not leaf.stacked:
        yield 0, tuple(index), leaf.torch[0]
        return
    for place, part in enumerate(range(*index[0].indices(leaf.shape[0]))):
        yield place, tuple(index[1:]), leaf.torch[part]
