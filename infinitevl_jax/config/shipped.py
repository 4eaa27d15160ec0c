"""The presets that come with the package: configs/ of a checkout, share/infinitevl_jax/configs of
an installed wheel."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def shipped_presets() -> dict[str, Path]:
    """Name (such as "easy_vqa") -> file."""
    folder = _folder()
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.toml"))}


def find_preset(name: str | Path) -> Path:
    """The file of a preset: `name` itself where it is a path, else the shipped preset of that
    name."""
    shipped = shipped_presets().get(str(name))
    return Path(name) if shipped is None or Path(name).is_file() else shipped


def known_presets() -> list[str]:
    """What a user can write to name a preset: files of ./configs, and the names of shipped ones
    that are not among them."""
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
