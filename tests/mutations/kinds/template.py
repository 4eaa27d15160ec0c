"""Chat templates.

Chat_template.jinja, chat_template.json and the entry of tokenizer_config.json.
"""

import importlib.resources
import json
from pathlib import Path
from random import Random

import jinja2
import jinja2.ext
import jinja2.sandbox

from infinitevl_jax import Processor

from ..case import Case, Place
from ..content import encode, mutate_bytes, mutate_file, mutate_text
from ..values import OTHERS, dump
from . import processors
from .processors import byte_ids

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is it?"},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "and now?"},
]
# What never ends, or builds more than memory holds: N stands for a large number.
BOMBS = [
    "{% for i in range(N) %}{% for j in range(N) %}{% endfor %}{% endfor %}x",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}",
    "{{ ('a' * N)|length }}",
    "{{ 'a' * N }}",
    "{{ '%0Nd' % 1 }}",
    "{{ '{:>N}'.format(1) }}",
    "{{ 'a'.ljust(N) }}",
    "{{ 'a'.center(N) }}",
    (
        "{% set x = namespace(v='a') %}{% for i in range(99) %}{% set x.v = x.v + x.v %}{% endfor"
        " %}{{ x.v }}"
    ),
    (
        "{% set x = namespace(v=[1]) %}{% for i in range(99) %}{% set x.v = x.v + x.v %}{% endfor"
        " %}{{ x.v|length }}"
    ),
    "{{ [0] * N }}",
    "{{ range(99999)|list * 9999 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ (9 ** 99999999)|string }}",
    "{{ 1 << N }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
    "{{ ('a,' * 999999)|replace(',', 'aaaaaaaa' * 9999) }}",
    "{{ 'a'|center(N) }}",
    "{{ 'a\n'|indent(N) }}",
    "{{ lipsum(n=N) }}",
    "{% for i in range(N) %}{% set a = 'x' * 1000 %}{% endfor %}",
    "{{ ('x' * 99999)|wordwrap(1) * 9999 }}",
    "{{ range(N)|sum }}",
    "{{ ('a' * 50000 ~ 'b')|urlize }}",
    "{{ range(99999)|map('string')|join('x' * 99999) }}",
    "{% set a = 'x' * 100000 %}{{ a.join([a] * 100000) }}",
    "{{ ('a' * 9999).encode().hex() * N }}",
    "{{ messages|tojson(indent=N) }}",
    "{{ 'x'.zfill(N) }}",
    "{{ 'x\t'.expandtabs(N) }}",
    "{{ 'ab'|slice(N)|list }}",
]
ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends 'x' %}",
    "{{ self._TemplateReference__context }}",
    "{{ ''|attr('__class__') }}",
    "{{ '{0.__class__}'.format('') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ lipsum.__globals__['os'] }}",
    "{{ joiner.__init__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
]
ODD = [
    "{{ strftime_now('%Y') }}",
    "{{ strftime_now(3) }}",
    "{{ strftime_now('%' * 99) }}",
    "{{ strftime_now('\\ud83d') }}",
    "{{ raise_exception('\x1b[2Jno') }}",
    "{{ 1 / 0 }}",
    "{{ messages[99].content }}",
    "{{ nothing }}",
    "{{ nothing.more }}",
    "{% for m in messages %}{{ m.content }}",
    "{{",
    "{% end %}",
    "",
    "{{ messages|tojson }}",
    "{% generation %}x{% endgeneration %}",
    "{{ undefined() }}",
    "{{ messages + 'x' }}",
    "{{ '\\ud83d' }}",
    "{% set messages = [] %}x",
    "{{ tools }}",
    "{{ messages|map(attribute='content')|join }}",
    "{% break %}",
    "{{ messages | sort }}",
    "{{ '\\0' }}",
]


def builtin() -> str:
    return (
        importlib.resources.files("infinitevl_jax.processing")
        .joinpath("qwen_vl.jinja")
        .read_text("utf-8")
    )


def make(rng: Random, place: Place) -> Case:
    folder = place.copy("bytes-only", processors.bytes_only)
    kind = rng.choice(
        ["text"] * 4 + ["bomb"] * 3 + ["escape", "odd", "odd", "bytes", "file", "json"]
    )
    path, template = folder / "chat_template.jinja", builtin()
    if kind == "text":
        template, label = mutate_text(rng, template)
    elif kind == "bomb":
        template = label = rng.choice(BOMBS).replace(
            "N", rng.choice(["99999999", "9999999999", "999999"])
        )
    elif kind == "escape":
        template = label = rng.choice(ESCAPES)
    elif kind == "odd":
        template = label = rng.choice(ODD)
    if kind in ("bytes", "file"):
        path.write_text(template)
        if kind == "file":
            label = mutate_file(rng, path, place.work / "outside")
        else:
            data, label = mutate_bytes(rng, path.read_bytes())
            path.write_bytes(data)
        template = None
    elif kind == "json" or rng.random() < 0.3:
        path = folder / rng.choice(["chat_template.json", "tokenizer_config.json"])
        content = json.loads(path.read_text()) if path.exists() else {}
        entry = template
        if kind == "json":
            entry = rng.choice(
                [
                    *OTHERS,
                    [{"name": "default", "template": template}],
                    [{"name": "other", "template": "x"}],
                    [{"name": "default"}],
                    3,
                ]
            )
            label, template = f"chat_template = {entry!r:.60}", None
        path.write_bytes(dump({**content, "chat_template": entry}))
    else:
        path.write_bytes(encode(template))

    def action():
        processor = Processor.from_pretrained(folder)
        return processor(MESSAGES)["input_ids"][0].tolist()

    def check(found):
        text = template if template is not None else _lying_there(folder)
        wanted = byte_ids(_plain(text))
        return (
            ""
            if found == wanted
            else f"another prompt than Jinja renders: {bytes(i for i in found if i < 256)!r:.120}"
        )

    return Case(f"{path.name}: {label:.120}", action, check)


def _lying_there(folder: Path) -> str:
    """The template that a folder holds, built-in where it holds none."""
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_bytes().decode("utf-8-sig")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).exists():
            entry = json.loads((folder / name).read_text()).get("chat_template")
            if isinstance(entry, list):
                entry = next(
                    (
                        e["template"]
                        for e in entry
                        if isinstance(e, dict) and e.get("name") == "default"
                    ),
                    None,
                )
            if isinstance(entry, str):
                return entry
    return builtin()


def _plain(text: str) -> str:
    """What Jinja itself makes of it, with the few helpers that templates are promised."""
    import datetime

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False)
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    text = text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return environment.from_string(text).render(
        messages=MESSAGES, add_generation_prompt=True, **special
    )
