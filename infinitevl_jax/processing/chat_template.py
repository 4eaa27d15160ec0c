"""Chat templates: conversation -> prompt text, by the checkpoint's or the built-in template."""

import datetime
import functools
import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser

from infinitevl_jax import reading
from infinitevl_jax.errors import InfiniteVLError
from infinitevl_jax.processing import sandbox
from infinitevl_jax.processing import tokenizer_files as files

LONGEST = 131_072  # characters of a template; released ones have up to 20,000


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template and its origin."""

    text: str
    source: str

    @classmethod
    def builtin(cls) -> "ChatTemplate":
        """The template shipped with this package (qwen_vl.jinja)."""
        text = (
            importlib.resources.files("infinitevl_jax.processing")
            .joinpath("qwen_vl.jinja")
            .read_text("utf-8")
        )
        return cls(text, "built-in qwen_vl.jinja")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ChatTemplate":
        """Load a folder's template.

        Sources in order: chat_template.jinja, chat_template.json, tokenizer_config.json, built-in.
        """
        folder = Path(folder)
        plain = folder / "chat_template.jinja"
        if plain.exists():
            try:
                return cls(reading.read_bytes(plain, LONGEST).decode("utf-8"), str(plain))
            except UnicodeDecodeError as error:
                raise InfiniteVLError(
                    f"{plain} is not UTF-8: {error}", "copy it again from the source checkpoint"
                ) from error
        for name in ("chat_template.json", "tokenizer_config.json"):
            path = folder / name
            entry = files.read_optional(path, files.Settings).chat_template
            if isinstance(entry, list):  # several named templates
                named = {item.name: item.template for item in entry}
                if named and "default" not in named:
                    raise InfiniteVLError(
                        f"{path} has the chat templates {', '.join(named)}, but none is named"
                        " default",
                        "write the one to use into chat_template.jinja",
                    )
                entry = named.get("default")
            if entry is not None:
                if len(entry) > LONGEST:
                    raise InfiniteVLError(
                        f"{path} has a chat template of {len(entry):,} characters, more than"
                        f" {LONGEST:,}",
                        "check the file",
                    )
                return cls(entry, str(path))
        return cls.builtin()

    @property
    def is_builtin(self) -> bool:
        return self.source.startswith("built-in")

    def render(
        self, messages: list[dict], add_generation_prompt: bool = False, **variables: object
    ) -> str:
        """Render messages to prompt text.

        Args:
          messages: plain data.
          variables: further template variables, such as bos_token or tools.
        """
        try:
            with sandbox.budget(messages, variables):
                return _compile(self.text).render(
                    messages=messages, add_generation_prompt=add_generation_prompt, **variables
                )
        except sandbox.OverBudget as error:
            raise InfiniteVLError(
                f"chat template {self.source} was stopped: {error}",
                "use the template of the source checkpoint",
            ) from error
        except jinja2.TemplateSyntaxError as error:
            raise InfiniteVLError(
                f"chat template {self.source}, line {error.lineno}: {error.message}",
                "fix or remove the file; without one the built-in is used",
            ) from error
        # A template is a program and may raise any exception, such as ZeroDivisionError.
        except Exception as error:
            raise InfiniteVLError(
                f"chat template {self.source} refuses this conversation: {str(error)[:300]}",
                "check the order of roles and whether the template takes pictures (a text model's"
                " does not)",
            ) from error


class _Generation(jinja2.ext.Extension):
    """Renders the body of {% generation %} ... {% endgeneration %}, which marks assistant text."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators=None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=16)
def _compile(text: str) -> jinja2.Template:
    environment = sandbox.Environment(
        [_Generation, jinja2.ext.loopcontrols],
        {"tojson": _to_json},
        {
            "raise_exception": _raise_exception,
            "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        },
    )
    return environment.from_string(text)
