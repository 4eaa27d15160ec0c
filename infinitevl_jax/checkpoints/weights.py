"""The weight table: torch name <-> our name, read in both directions.

It is derived: each parameter says how torch names and orders it (`infinitevl_jax.nn.parameter`),
each family how its files spell the path to it (`infinitevl_jax.families`). Every torch tensor is
used once and every parameter filled once; what does not fit is named.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from infinitevl_jax.config.model import ModelConfig
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.families import family
from infinitevl_jax.nn.parameter import Facts
from infinitevl_jax.nn.params import parameters
from infinitevl_jax.nn.stack import Scanned

HUB, RUNTIME = "published", "live"  # as written into manifests
# prefixes of transformers' live modules -> of published files
_RUNTIME = (("model.language_model.", "model."), ("model.visual.", "visual."))


def hub_name(name: str) -> str:
    """A torch name in the hub's spelling of most families, whichever of the two it came in.

    Tensors are known by it here, also those of a family whose files on the hub have the other."""
    return next(
        (new + name.removeprefix(old) for old, new in _RUNTIME if name.startswith(old)), name
    )


def runtime_name(name: str) -> str:
    """A hub name as transformers' live modules spell it."""
    return next(
        (old + name.removeprefix(new) for old, new in _RUNTIME if name.startswith(new)), name
    )


@dataclass(frozen=True)
class Leaf:
    """One of our parameters, and the torch tensors that fill it.

    Attributes:
      name, shape: ours; a stacked leaf has a leading axis over `torch`.
      layers: names on disk, one for each slice.
      torch: published names, one for each slice.
      torch_shape: of each of them.
    """

    name: str
    shape: tuple[int, ...]
    layers: tuple[str, ...]
    torch: tuple[str, ...]
    torch_shape: tuple[int, ...]
    stacked: bool
    transposed: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def slice(self, part: int) -> tuple:
        """Index of the part that torch tensor number `part` fills."""
        return (part,) if self.stacked else ()

    def to_torch(self, part: np.ndarray) -> np.ndarray:
        """One slice of ours -> the torch tensor."""
        return np.ascontiguousarray(part.T if self.transposed else part).reshape(self.torch_shape)


def leaves(config: ModelConfig, *, scanned: Scanned) -> list[Leaf]:
    """Every parameter of a model in one layout, with the torch tensors behind it."""
    out = []
    for name, parameter in parameters(config, scanned=scanned).items():
        facts = parameter.facts
        torch = tuple(tensor_name(config, _torch_path(layer, facts)) for layer in parameter.layers)
        shape, stacked = parameter.shape, parameter.stacked
        kind = (facts.torch_shape, stacked, facts.transposed)
        out.append(Leaf(name, shape, parameter.layers, torch, *kind))
    times = Counter(name for leaf in out for name in leaf.torch)
    if twice := [name for name in times if times[name] > 1]:
        raise InfiniteVLError(
            f"the family {config.family} gives several tensors the name {twice[0]}",
            "correct its tensor_names",
        )
    return out


def tensor_name(config: ModelConfig, path: str) -> str:
    """Torch name of the tensor at our path, such as "norm.weight"."""
    return hub_name(family(config.family).tensor_name(path))


def embedding_name(config: ModelConfig) -> str:
    """Torch name of the token table."""
    return tensor_name(config, "embed_tokens.weight")


def head_name(config: ModelConfig) -> str:
    """Torch name of the output head, also where it is tied to the token table."""
    return tensor_name(config, "lm_head.weight")


def own_spelling(config: ModelConfig) -> str:
    """How the family's files on the hub spell names."""
    own = family(config.family).tensor_name("embed_tokens.weight")
    return HUB if own == embedding_name(config) else RUNTIME


def _torch_path(name: str, facts: Facts) -> str:
    """Our path to a parameter, with torch's name of it at the end."""
    module, _, own = name.rpartition(".")
    return f"{module}.{facts.torch_name or own}"


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
    head = head_name(config)
    if config.text.tie_word_embeddings and head in shapes:
        expected[head] = expected[embedding_name(config)]
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
