"""Hugging Face's config.json with declared keys, types and ranges."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.reading import convert

# Limits far above every published model, so that a damaged file is refused before anything is
# built.
Layers = Annotated[int, Meta(ge=1, le=128)]  # the deepest published decoders have 126
Size = Annotated[int, Meta(ge=1, le=1 << 20)]
Index = Annotated[int, Meta(ge=0, le=1 << 20)]
Window = Annotated[int, Meta(ge=0, le=1 << 30)]  # tokens; 0 where no layer has one
TokenId = Annotated[int, Meta(ge=-1, le=2**31 - 1)]  # -1 is how some writers say "none"
Vocabulary = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Eps = Annotated[float, Meta(ge=0, lt=1)]
Theta = Annotated[float, Meta(ge=1, le=1e18)]
Rate = Annotated[float, Meta(gt=0, le=1e6)]
Deviation = Annotated[float, Meta(ge=0, le=10)]
SILU = ("silu", "swish")

K = TypeVar("K", bound=msgspec.Struct)


class Keys:
    """Several JSON objects read as one. The first that has a key (not null) has precedence.

    Attributes:
      source: what the file is called in messages.
      scopes: the objects.
      merged: all keys that are not null.
    """

    def __init__(self, source: str, *scopes: Mapping[str, Any]):
        self.source, self.scopes = source, scopes
        self.merged = {
            name: _plain(value)
            for scope in reversed(scopes)
            for name, value in scope.items()
            if value is not None
        }

    def read(self, kind: type[K]) -> K:
        """The keys that `kind` declares, checked. Other keys are ignored."""
        return convert(self.merged, kind, self.source)

    def check(self, accepted: Mapping[str, tuple]) -> None:
        """Check keys that change the maths.

        Args:
          accepted: key -> values that are implemented. Absent and null are always accepted.

        Raises:
          InfiniteVLError: names the first key with another value.
        """
        for name, value in ((name, scope.get(name)) for name in accepted for scope in self.scopes):
            if value is not None and value not in accepted[name]:
                raise InfiniteVLError(
                    f"{self.source}: {name} = {_shown(value)} changes the maths in a way that is"
                    " not implemented",
                    f"{name} {_wanted(accepted[name])}: use weights trained that way"
                    + (" (or dequantised to bf16)" if name == "quantization_config" else "")
                    + "; delete the key only if the weights do not use it",
                )

    def section(self, name: str) -> Mapping[str, Any] | None:
        """The object under a key, None where there is none; InfiniteVLError for another value."""
        value = self.merged.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise InfiniteVLError(f"{self.source}: {name} is {value!r}", "it has to be an object")
        return value


def given(keys: msgspec.Struct, *names: str) -> dict[str, Any]:
    """The keys that the file has, of `names` or of all.

    For the others the configuration class has the default.
    """
    names = names or keys.__struct_fields__
    return {name: getattr(keys, name) for name in names if getattr(keys, name) is not None}


@dataclass(frozen=True)
class ConfigFile:
    """A config.json, and the generation_config.json beside it.

    Attributes:
      content: of config.json; flat (as published), or with a nested text_config (newer writers).
      source: what the file is called in messages.
      generation: content of generation_config.json, where there is one.
    """

    content: Mapping[str, Any]
    source: str = "config.json"
    generation: Mapping[str, Any] | None = None

    def __post_init__(self):
        for name in ("text_config", "vision_config"):
            value = self.content.get(name)
            if not isinstance(value or {}, Mapping):
                raise InfiniteVLError(
                    f"{self.source}: {name} is a {type(value).__name__}", "it has to be an object"
                )

    @property
    def nested(self) -> Mapping[str, Any]:
        """text_config, or an empty object."""
        return self.content.get("text_config") or {}

    @property
    def decoder(self) -> Keys:
        """Keys of the decoder, in text_config or at the top."""
        return Keys(self.source, self.nested, self.content)

    @property
    def vision(self) -> Mapping[str, Any] | None:
        """vision_config."""
        return self.content.get("vision_config")


def _plain(value: Any) -> Any:
    """A whole number without its point: some writers have 14.0 for 14."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**63
    return int(value) if whole else value


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return repr(value)
    return f"{{{', '.join(map(repr, list(value)[:3]))}, ...}}"


def _wanted(accepted: Sequence[Any]) -> str:
    if not accepted:
        return "has to be absent or null"
    return f"has to be {' or '.join(map(repr, accepted))}"
