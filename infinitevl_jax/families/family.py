"""A family of models, and the families that are known."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """How a family spells what it has in common with the others.

    Attributes:
      name: `model_type` in config.json.
      tensor_names: prefixes of our torch-like paths ("layers.3.mlp.up_proj.weight") -> prefixes of
        the family's tensor names; the first that fits is replaced.
    """

    name: str
    tensor_names: tuple[tuple[str, str], ...]

    def tensor_name(self, path: str) -> str:
        """The family's name of a tensor, as its files on the hub spell it."""
        for ours, hub in self.tensor_names:
            if path.startswith(ours):
                return hub + path.removeprefix(ours)
        return path


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known under its name."""
    _FAMILIES[family.name] = family


def family(name: str) -> Family:
    """The registered family of that name."""
    return _FAMILIES[name]


QWEN = (
    ("visual.patch_embed.", "visual.patch_embed.proj."),
    ("visual.merger.fc1.", "visual.merger.mlp.0."),
    ("visual.merger.fc2.", "visual.merger.mlp.2."),
    ("layers.", "model.layers."),
    ("embed_tokens.", "model.embed_tokens."),
    ("norm.", "model.norm."),
)
for _name in ("infinite_vl", "qwen2_5_vl", "qwen2"):
    register_family(Family(_name, QWEN))
