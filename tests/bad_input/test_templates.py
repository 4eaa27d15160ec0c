"""Templates that loop or build huge values are stopped in seconds, with little memory."""

import resource
import sys
import time

import pytest

from infinitevl_jax import InfiniteVLError
from infinitevl_jax.processing import ChatTemplate, sandbox

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello " * 50}]
LONG = "{% set s = 'x' * 1000000 %}"
BOMBS = {
    "a constant": "{{ 'x' * 10 ** 9 }}",
    "a constant's length": "{{ ('a' * 4 * 10 ** 9) | length }}",
    "a constant the other way round": "{{ 4000000000 * 'a' }}",
    "a long list": "{{ ([0] * 10 ** 9) | length }}",
    "a tuple": "{{ ((0, 1) * 10 ** 9) | length }}",
    "nested loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x"
    ),
    "nested loops that write": (
        "{% for i in range(99999) %}{% for j in range(99999) %}literal{% endfor %}{% endfor %}x"
    ),
    "a loop over all messages": (
        "{% for a in messages * 9999 %}{% for b in messages * 9999 %}{{ b.content }}{% endfor %}{%"
        " endfor %}"
    ),
    "a recursive loop": "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
    "a macro that calls itself": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
    ),
    "a macro's text": (
        "{% macro f() %}"
        + "x" * 1000
        + "{% endmacro %}{% for i in range(99999) %}{{ f() }}{% endfor %}"
    ),
    "doublings": (
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor"
        " %}{{ n.s | length }}"
    ),
    "sums": (
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor"
        " %}{{ n.s | length }}"
    ),
    "doublings in a block": (
        "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set t %}{{ n.s }}{{ n.s }}{%"
        " endset %}{% set n.s = t %}{% endfor %}{{ n.s | length }}"
    ),
    "many at once": LONG + "{{ (" + " ~ ".join(["s"] * 5000) + ") | length }}",
    "a shared list": (
        "{% set n = namespace(l=[1]) %}{% for i in range(60) %}"
        "{% set n.l = [n.l, n.l] %}{% endfor %}{{ n.l | string | length }}"
    ),
    "two shared lists": (
        "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}"
        "{% set n.b = [n.b, n.b] %}{% endfor %}{{ n.a == n.b }}"
    ),
    "shared objects": (
        "{% set n = namespace(l={}) %}{% for i in range(60) %}{% set n.l = {1: n.l, 2: n.l} %}{%"
        " endfor %}{{ n.l | tojson }}"
    ),
    "shared namespaces": (
        "{% set n = namespace(l=namespace(x=1)) %}{% for i in range(60) %}{% set n.l ="
        " namespace(a=n.l, b=n.l) %}{% endfor %}{{ n.l }}"
    ),
    "pieces kept": (
        LONG
        + "{% set n = namespace(l=[]) %}{% for i in range(9999) %}{% set n.l = n.l + [s[i:]] %}{%"
        " endfor %}"
    ),
    "slices": LONG + "".join(f"{{% set a{i} = s[{i}:] %}}" for i in range(4000)),
    "a number": "{{ 10 ** 100000 ** 2 }}",
    "a number by squares": (
        "{% set n = namespace(x=7) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor"
        " %}{{ n.x > 3 }}"
    ),
    "a rounding": "{{ 1.5 | round(1000000000, 'floor') }}",
    "a wide filter": "{{ 'x' | center(1000000000) }}",
    "a wide filter on a constant": "{% if 'x' | center(1000000000) %}{% endif %}",
    "a wide method": "{{ 'x'.ljust(4000000000) }}",
    "zeros": "{{ 'x'.zfill(4000000000) }}",
    "a replacement": LONG + "{{ s.replace('x', s) | length }}",
    "a replacement by a filter": LONG + "{{ s | replace('x', s) | length }}",
    "a replacement of nothing": LONG + "{{ s.replace('', s) | length }}",
    "a translation": LONG + "{{ s.translate({120: s}) | length }}",
    "tabs": "{{ ('\t' * 1000).expandtabs(100000000) }}",
    "a join": LONG + "{{ s.join(range(9999) | map('string')) | length }}",
    "a join by a filter": LONG + "{{ range(9999) | map('string') | join(s) | length }}",
    "a join of letters": LONG + "{{ s | join(s) | length }}",
    "a sum of lists": "{{ range(9999) | map('batch', 9999) | sum(start=[]) }}",
    "a sum of many lists": (
        "{% set l = [range(4000) | list] * 4000 %}{{ l | sum(none, []) | length }}"
    ),
    "joined references": LONG + "{{ ([s] * 9999) | join | length }}",
    "an indent": "{{ ('x\n' * 100000) | indent(100000) | length }}",
    "an indent of JSON": "{{ messages | tojson(indent=1000000000) }}",
    "a format": "{{ '%1000000000d' % 1 }}",
    "a format of a width": "{{ '%*d' % (1000000000, 1) }}",
    "a format by a filter": "{{ '%1000000000d' | format(1) }}",
    "a precise format": "{{ '%.1000000000f' % 1.5 }}",
    "a format's method": "{{ '{:1000000000}'.format(1) }}",
    "a format of another width": "{{ '{0:{1}}'.format(1, 1000000000) }}",
    "a hidden width": "{{ '{0[0]:{0[1]}}'.format([1, 1000000000]) }}",
    "a format map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "a repeated name": LONG + "{{ ('%(a)s' * 9999) % {'a': s} }}",
    "repeated fields": LONG + "{{ ('{0}' * 9999).format(s) }}",
    "batches": "{{ [1] | batch(1000000000, 0) | list | length }}",
    "slices of a list": "{{ [1] | slice(1000000000) | list | length }}",
    "numbers": "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "comparisons": (
        LONG + "{% for i in range(99999) %}{% if (s ~ 'y') in s %}{% endif %}{% endfor %}"
    ),
    "tests": LONG + "{% for i in range(99999) %}{% if s is in s %}{% endif %}{% endfor %}",
    "lorem ipsum": "{{ lipsum(n=10000000) }}",
    "depth": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "blocks in blocks": "{% if 1 %}" * 5000 + "x" + "{% endif %}" * 5000,
    "itself": "{% set n = namespace() %}{% set n.n = n %}{{ n }}",
    "dates": "{% for i in range(99999) %}{{ strftime_now('%c' * 9999) }}{% endfor %}",
    "many words": "{{ a }}" * 18_000 + "{{ 'x' * 10 ** 9 }}",
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_is_stopped(case, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 1.0)
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InfiniteVLError, match="chat template folder/chat_template.jinja") as caught:
        ChatTemplate(BOMBS[case], "folder/chat_template.jinja").render(MESSAGES)
    assert len(str(caught.value)) < 1000
    assert time.perf_counter() - began < 10
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (
        1 if sys.platform == "darwin" else 1024
    )
    assert grown < 1 << 30
    assert ChatTemplate("{{ messages[0].content }}", "next").render(MESSAGES) == "Hi"


def test_a_budget_grows_with_the_conversation():
    """A conversation far above the base budget is rendered, even by a template that copies."""
    messages = [{"role": "user", "content": "x" * 5_000_000}] * 10
    template = (
        "{% for m in messages %}{% set c = m.content | trim ~ '' %}{{ c + '\n' }}{% endfor %}"
    )
    assert len(ChatTemplate(template, "test").render(messages)) == 50_000_010 > sandbox.UNITS


WRITES = [
    (
        "{{ 'ab' * 3 }}{{ 2 * 'c' }}{{ 7 // 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ [1] + [2] }}",
        "abababcc310243[1, 2]",
    ),
    (
        "{{ '%s has %03d' % ('a', 7) }}{{ '%s' % 'b' }}{{ '{:>5}|{}'.format('x', 'y') }}",
        "a has 007b    x|y",
    ),
    ("{{ 'a' ~ 1 ~ none ~ unknown }}", "a1None"),
    ("{% set a, b = 1, [2, 3] %}{{ a }}{{ b[1:] }}{{ (1, 2)[0] }}{{ {'k': 'v'}['k'] }}", "1[3]1v"),
    (
        (
            "{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{{ loop.index }}{{ loop.last }}{%"
            " endfor %}"
        ),
        "a=11True",
    ),
    (
        (
            "{% for m in messages recursive %}{{ loop.length }}{{ loop(m.more) if m.more else ''"
            " }}{% else %}none{% endfor %}"
        ),
        "22",
    ),
    (
        (
            "{% for i in range(9) if i is odd %}{% if i == 5 %}{% continue %}{% endif %}{{ i }}{%"
            " endfor %}"
        ),
        "137",
    ),
    (
        (
            "{% macro f(x, y='!') %}<{{ x }}{{ y }}{{ caller() if caller else '' }}>{% endmacro %}"
            "{{ f('a') }}{% call f('b', y='?') %}c{% endcall %}"
        ),
        "<a!><b?c>",
    ),
    ("{% set x %}{{ 'a' }}b{% endset %}{{ x | upper }}{% filter trim %}  y {% endfilter %}", "ABy"),
    (
        (
            "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role',"
            " 'equalto', 'user') | list | length }}"
        ),
        "user, assistant1",
    ),
    (
        (
            "{{ messages[0].content.split('i')[0].strip() }}{{ 'x' in 'xy' }}{{ 1 < 2 <= 2 }}{{"
            " messages is iterable }}"
        ),
        "HTrueTrueTrue",
    ),
    (
        (
            "{% set ns = namespace(found=false) %}{% for m in messages %}{% set ns.found = true"
            " %}{% endfor %}{{ ns.found }}"
        ),
        "True",
    ),
    (
        (
            "{{ messages[::-1][0]['role'] }}{{ messages[-1:] | length }}{{ 'abc'[1:] }}{{ 1.5 |"
            " round | int }}"
        ),
        "assistant1bc2",
    ),
    (
        (
            "{{ (messages | first).role }}{{ 'é' | tojson }}{{ '<' | e }}{{ undefined |"
            " default('d') }}"
        ),
        'user"é"&lt;d',
    ),
]


@pytest.mark.parametrize(("template", "text"), WRITES)
def test_everything_else_is_written_as_jinja_writes_it(template, text):
    assert ChatTemplate(template, "test").render(MESSAGES) == text
