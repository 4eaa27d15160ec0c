"""Shipped presets: configs/ of a checkout, or share/infinitevl_jax/configs of a wheel."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped_presets() -> dict[str, Path]:
    """Files of the shipped presets by name, such as "easy_vqa"."""
    folder = _folder()
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_preset(name: str | Path) -> Path:
    """The file of a preset, given by path or by the name of a shipped one."""
    shipped = shipped_presets().get(str(name))
    return Path(name) if shipped is None or Path(name).is_file() else shipped


def known_presets() -> list[str]:
    """Valid preset arguments: files in ./configs, and names of other shipped presets."""
    here = sorted(Path("configs").glob("*.toml"))
    files = {path.resolve() for path in here}
    names = [name for name, path in shipped_presets().items() if path.resolve() not in files]
    return [*map(str, here), *names]


def _folder() -> Path | None:
    root = PACKAGE.parent
    if (root / "pyproject.toml").is_file():
        return root / "configs"
    # A wheel's data files lie below the prefix: sys.prefix, ~/.local, or the folder of --target.
    folders = (above / "share" / "infinitevl_jax" / "configs" for above in PACKAGE.parents)
    return next((folder for folder in folders if folder.is_dir()), None)
