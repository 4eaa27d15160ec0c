"""Tables of a preset whose key `name` chooses a kind with its own options, such as the objective.

A kind is a frozen dataclass that inherits from the table's base class. Packages that add a kind
register its options here.
"""

from typing import Any, Literal

from infinitevl_jax.config.ranges import check_value
from infinitevl_jax.errors import InfiniteVLError

_VARIANTS: dict[type, dict[str, type]] = {}


def register_variant(base: type, name: str, options: type) -> None:
    """Let `name` in a table of `base` choose `options`.

    Raises InfiniteVLError if the name is taken by other options.
    """
    known = _VARIANTS.setdefault(base, {})
    if known.setdefault(name, options) is not options:
        raise InfiniteVLError(f"{name!r} is registered already", "choose another name")


def variants(base: type) -> dict[str, type]:
    """The options of every name of a table; empty if the table has no kinds."""
    return _VARIANTS.get(base, {})


def check_name(base: type, config: Any, key: str) -> None:
    """Raise InfiniteVLError unless the options of a table are those of their name.

    Args:
      key: dotted name of the table.
    """
    known = variants(base)
    check_value(config.name, Literal[tuple(sorted(known))], f"{key}.name")
    if type(config) is not known[config.name]:
        raise InfiniteVLError(
            f"{key} is a {type(config).__name__} called {config.name!r}",
            f"give a {known[config.name].__name__}",
        )
