"""Sandbox for chat templates from outside, with a budget for each rendering.

Jinja's sandbox keeps a template away from Python. The budget bounds its time and memory. A value's
size is charged before it is made, or right after if it cannot be much larger than its inputs. Every
loop iteration, call, filter, test and comparison checks the time.
"""

import functools
import re
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

SECONDS = 5.0
UNITS = 1 << 25  # characters and list items that a rendering may make
PER_GIVEN = 32  # additional units for each that it is given
DIGITS = 1 << 16  # largest number of bits of an integer


class OverBudget(jinja2.TemplateError):
    """A template exceeded its budget."""


class _Budget:
    def __init__(self, given: int):
        self.left = UNITS + PER_GIVEN * given
        self.deadline = time.monotonic() + SECONDS

    def check(self, units: float) -> None:
        if units > self.left:
            raise OverBudget(f"it makes more than {UNITS:,} characters or items")
        if time.monotonic() > self.deadline:
            raise OverBudget(f"it takes more than {SECONDS:g} seconds")


_now = threading.local()


@contextmanager
def budget(*given: object):
    """Context manager in which templates compile and render within a budget.

    Args:
      given: template variables; the budget grows with their size.
    """
    _now.budget = _Budget(0)
    try:
        _now.budget = _Budget(sum(size(value) for value in given))
        yield
    finally:
        del _now.budget


def spend(units: int = 1) -> None:
    """Charge some units of work."""
    _now.budget.check(units)
    _now.budget.left -= units


def size(value: object) -> int:
    """Characters and items of a value when written out; shared parts count each time."""
    if isinstance(value, str | bytes):
        return 1 + len(value)
    total, waiting = 0, [value]
    while waiting:
        item = waiting.pop()
        total += 1
        if isinstance(item, str | bytes | range):
            total += len(item)
        elif isinstance(item, list | tuple | set | frozenset):
            waiting.extend(item)
        elif isinstance(item, dict):
            waiting.extend(item)
            waiting.extend(item.values())
        elif isinstance(item, Namespace):
            waiting.append(object.__getattribute__(item, "_Namespace__attrs"))
        if total % 1024 == 0 or len(waiting) > 1024:
            _now.budget.check(total)
    return total


def made(value):
    """Charge the size of a new value and return it."""
    spend(size(value))
    return value


def seen(value):
    """Charge one unit for a value that is only inspected, and return it."""
    spend()
    return value


def concat(*parts: object) -> str:
    """The ~ operator."""
    spend(sum(size(part) for part in parts))
    return "".join(map(str, parts))


@jinja2.pass_context
def _written(context, value):
    """Finalizer of {{ }}."""
    return made(value)


def _check_growth(value: object, arguments: list) -> None:
    """Check the bound on a method's or filter's result: value size x largest argument."""
    most = max([1, *[abs(a) if isinstance(a, int) else size(a) for a in arguments]])
    _now.budget.check(size(value) * most)


# Widths in format strings. A width taken from another argument cannot be bounded in advance.
PRINTF = re.compile(r"%[^%a-zA-Z]*(?:\*|\d{5})")
FORMAT = re.compile(r"\{[^{}]*:[^{}]*(?:\{|\d{5})")


def _check_format(text: object, expression: re.Pattern) -> None:
    if isinstance(text, str) and expression.search(text):
        raise OverBudget("it formats to a width of 10,000 or more, or of another value")


def _held(arguments: tuple) -> list:
    """Materialise iterators, so that their size is known."""
    return [list(a) if hasattr(a, "__next__") else a for a in arguments]


def _filter(name: str, function: Callable) -> Callable:
    first = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def run(*args, **kwargs):
        spend()
        value, *others = _held(args[first:]) or [""]
        _check_growth(value, [*others, *kwargs.values()])
        if name == "format":
            _check_format(value, PRINTF)
        if name == "sum" and not isinstance(
            kwargs.get("start", [0, 0, *others[1:]][-1]), int | float
        ):
            raise OverBudget("it sums lists, which takes quadratic time")
        return made(function(*args[:first], value, *others, **kwargs))

    return run


def _test(function: Callable) -> Callable:
    @functools.wraps(function)
    def run(*args, **kwargs):
        spend()
        return function(*args, **kwargs)

    return run


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Hugging Face's environment for chat templates, with a budget."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(
        self, extensions: list, filters: dict[str, Callable], globals: dict[str, Callable]
    ):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=extensions,
            optimized=False,
            finalize=_written,
        )
        # filters for web pages, whose run time has no useful bound
        for name in ("urlize", "striptags", "wordwrap", "pprint", "xmlattr"):
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters = {
            name: _filter(name, function) for name, function in (self.filters | filters).items()
        }
        self.tests = {name: _test(function) for name, function in self.tests.items()}
        self.globals |= globals

    def _generate(self, source, *args, **kwargs):
        return super()._generate(_Metered().visit(source), *args, **kwargs)

    def call(__self, __context, __obj, *args, **kwargs):  # noqa: N805  argument names may clash
        if __obj in (made, seen, spend, concat):
            return __obj(*args)
        spend()
        # Jinja wraps str.format
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str | bytes | list | tuple | dict):
            args = _held(args)
            _check_growth(owner, [*args, *kwargs.values()])
            if getattr(__obj, "__name__", "") in ("format", "format_map"):
                _check_format(owner, FORMAT)
        return made(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context, operator, left, right):
        spend()
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers and left.bit_length() * max(right, 0) > DIGITS:
            raise OverBudget(f"it makes a number of more than {DIGITS:,} bits")
        if operator == "*" and numbers and left.bit_length() + right.bit_length() > DIGITS:
            raise OverBudget(f"it makes a number of more than {DIGITS:,} bits")
        if operator == "*" and isinstance(left, int) != isinstance(right, int):
            count, value = (left, right) if isinstance(left, int) else (right, left)
            _check_growth(value, [count])
        if operator == "+":
            _now.budget.check(size(left) + size(right))
        if operator == "%" and isinstance(left, str):
            _check_format(left, PRINTF)
            _check_growth(left, [right if isinstance(right, tuple | list | dict) else [right]])
        return made(super().call_binop(context, operator, left, right))


class _Metered(NodeTransformer):
    """Inserts the charging calls into a template's syntax tree."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._turn(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._turn(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._turn(node)

    def visit_Block(self, node: nodes.Block) -> nodes.Node:
        return self._turn(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concat", node, *node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        return self._made(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return self._made(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self._made(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        return self._made(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _call("seen", node, node.expr)
        return node

    def _made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _call("made", node, node)

    def _turn(self, node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        """Charge the literal text of a body each time it runs."""
        literal = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(
            0, nodes.ExprStmt(_call("spend", node, nodes.Const(1 + literal)), lineno=node.lineno)
        )
        return node


def _call(name: str, at: nodes.Node, *arguments: nodes.Expr) -> nodes.Call:
    imported = nodes.ImportedName(f"{__name__}.{name}", lineno=at.lineno)
    return nodes.Call(imported, list(arguments), [], None, None, lineno=at.lineno)
