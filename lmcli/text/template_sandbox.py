"""jinja2 for chat templates: set up as transformers does, with bounded work and memory.

A template comes with a model, so it is code of others. jinja2's sandbox keeps it from files and
from Python; this file also counts its work. Loops, calls, filters and operators are charged for, by
the size of what they read, and refused where their result may be huge: a call such as "a" * 10**12
could not be interrupted. So a template ends within seconds, and 1 GB.
"""

import json
import math
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from datetime import datetime
from functools import wraps
from types import BuiltinMethodType, GeneratorType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import Context, Macro
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 18  # characters of a template; real ones have up to 30,000
MAX_SIZE = 1 << 24  # characters of a value, or of the output
MAX_STEPS = 1_000_000  # loop turns and calls, and one more per 1,000 characters that they read
STEP_CHARS = 1000
MAX_PRODUCT = 16 * MAX_SIZE  # bound of what a call may make, by MULTIPLYING
ITEM = 64  # what an item of a list counts, in characters
MACRO_TURNS = 4  # a macro's call takes the time of so many turns of a loop
MAX_BITS = 1 << 16  # of a whole number
# calls whose result may be as large as the product of what they get
MULTIPLYING = {
    *("batch", "center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "round"),
    *("slice", "to_bytes", "tojson", "translate", "zfill"),
}
# filters that do not look into the items of what they get, and of these those that read no item
INSTANT = {"count", "d", "default", "first", "items", "last", "length"}
SHALLOW = INSTANT | {*("list", "map", "reject", "rejectattr", "reverse", "select", "selectattr")}
# filters that may take the square of the time to read their input
SQUARED = {"striptags", "sum", "title", "urlize", "wordwrap", "xmlattr"}
# formats with a width of their own: a number of five digits, or one from an argument
WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\*|\d{5})")
WIDE_BRACES = re.compile(r"\{[^{}]*(\{|:[^{}]*\d{5})")


class TooMuchWork(jinja2.TemplateError):
    """A template does more than MAX_STEPS, or makes more than MAX_SIZE characters."""


def size_of(value: Any, by_value: bool = False) -> int:
    """Characters in a value, at least 1, and ITEM for each item; no further than MAX_SIZE.

    With `by_value` a whole number counts itself: it may be a width or a count.
    """
    if by_value and isinstance(value, int):
        return max(1, abs(value))
    if isinstance(value, str):
        return 1 + len(value)
    size, todo = 1, [value]
    while todo and size <= MAX_SIZE:
        item = todo.pop()
        if isinstance(item, str | bytes):
            size += len(item)
        elif isinstance(item, int):
            size += item.bit_length() // 3
        elif isinstance(item, dict | Namespace):
            items = item if isinstance(item, dict) else item._Namespace__attrs
            size += ITEM * len(items)
            todo += [*items.keys(), *items.values()]
        elif isinstance(item, list | tuple | set | KeysView | ItemsView | ValuesView):
            size += ITEM * len(item)
            todo += item
        elif isinstance(item, range | GeneratorType):
            size += MAX_RANGE
    return size


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one template; `written` are the characters of its output so far."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
        )
        self.steps = self.written = 0
        self.spans: list[tuple[int, int]] = []  # characters of the output in generation blocks
        self.turn = 1  # steps of a loop's turn
        self.filters["tojson"] = _tojson
        self.filters = {name: self._guarded(name, f) for name, f in self.filters.items()}
        self.filters |= {"_turns": self._turns, "_sliced": self._sliced}
        self.filters |= {"_joined": self._joined, "_sized": self._sized}
        self.finalize = self._sized
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "namespace": _TemplateNamespace,
            "dict": _TemplateDict(),
        }

    def template(self, source: str) -> jinja2.Template:
        """The compiled template; raises jinja2's errors and TooMuchWork."""
        if len(source) > MAX_SOURCE:
            raise TooMuchWork(f"it has more than {MAX_SOURCE:,} characters")
        self.turn = 1 + len(source) // STEP_CHARS  # a turn may write all of the template's text
        tree = _Guards(self).visit(self.parse(source))
        tree.set_environment(self)
        return self.from_string(tree)

    def render(
        self, template: jinja2.Template, values: dict[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        """The output of a template, and where its generation blocks are in it."""
        self.steps, self.written, self.spans, pieces = 0, 0, [], []
        for piece in template.generate(values):
            pieces.append(piece)
            self.written += len(piece)
            if self.written > MAX_SIZE:
                raise TooMuchWork(f"it writes more than {MAX_SIZE:,} characters")
        return "".join(pieces), self.spans

    def charge(self, steps: int) -> None:
        """Counts steps; raises TooMuchWork after MAX_STEPS."""
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise TooMuchWork("it does not end soon")

    def check(self, size: int) -> None:
        """Counts the reading or making of `size` characters; raises TooMuchWork for too many."""
        if size > MAX_SIZE:
            raise TooMuchWork(f"it makes texts of more than {MAX_SIZE:,} characters")
        self.charge(1 + size // STEP_CHARS)

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skipped = hasattr(function, "jinja_pass_arg")  # the context or environment comes first
        counted = self._turns if name in SHALLOW else self._sized_items

        @wraps(function)
        def guarded(*args: Any, **options: Any) -> Any:
            if name in SHALLOW:
                length = getattr(args[skipped], "__len__", lambda: 0)
                self.charge(1 + (0 if name in INSTANT else length() // STEP_CHARS))
            else:
                self._check_call(name, [*args[skipped:], *options.values()])
            lazy = (GeneratorType, range)
            args = tuple(counted(arg) if isinstance(arg, lazy) else arg for arg in args)
            return function(*args, **options)

        return guarded

    def _check_call(self, name: str, values: list[Any]) -> None:
        """Charges for a call with these values, the first of which is its subject."""
        sizes = [size_of(value, by_value=i > 0) for i, value in enumerate(values)]
        size = sum(sizes)
        if name in MULTIPLYING:
            size = math.prod(sizes) * MAX_SIZE // MAX_PRODUCT
        elif name in SQUARED:
            size *= size
        elif name == "format" and isinstance(values[0], str) and WIDE_PERCENT.search(values[0]):
            size = MAX_SIZE + 1
        self.check(size)

    def call(*arguments: Any, **options: Any) -> Any:
        """Calls an object for a template, if that is not too much."""
        self, context, function, *args = arguments  # options may be called `self`, too
        if isinstance(function, Macro):
            self.charge(MACRO_TURNS * self.turn)
        elif isinstance(function, BuiltinMethodType):
            values = [function.__self__, *args, *options.values()]
            self._check_call(function.__name__, values)
        else:
            self.check(sum(map(size_of, (*args, *options.values()))))
        return ImmutableSandboxedEnvironment.call(self, context, function, *args, **options)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator, if that is not too much."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length(), right.bit_length()
            size = {"*": sum(bits), "**": bits[0] * max(0, right)}.get(operator, 1)
            self.check(1 if size <= MAX_BITS else MAX_SIZE + 1)
        elif operator == "%" and isinstance(left, str):
            self.check(MAX_SIZE + 1 if WIDE_PERCENT.search(left) else size_of([left, right]))
        elif operator == "*":
            self.check(size_of(left, by_value=True) * size_of(right, by_value=True))
        elif operator == "+":
            self.check(sum(_length(value) for value in (left, right)))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` without access to attributes, and without wide fields."""
        wrapper = super().wrap_str_format(value)
        if wrapper and WIDE_BRACES.search(value.__self__):
            self.check(MAX_SIZE + 1)
        return wrapper

    def _turns(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.charge(self.turn)
            yield item

    def _sized_items(self, items: Iterable[Any]) -> Iterator[Any]:
        total = 0
        for item in items:
            size = size_of(item)
            total += size
            self.check(size if total <= MAX_SIZE else total)
            yield item

    def _sliced(self, value: Any) -> Any:
        self.check(_length(value))
        return value

    def _joined(self, values: list[Any]) -> str:
        return "".join(map(str, values))

    def _sized(self, value: Any) -> Any:
        self.check(size_of(value))
        return value


class GenerationBlocks(Extension):
    """`{% generation %}…{% endgeneration %}`: what the assistant says, noted in Sandbox.spans."""

    tags = {"generation"}  # noqa: RUF012  # jinja2's declaration
    environment: Sandbox

    def parse(self, parser: Any) -> nodes.Node:
        """The node of a block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
        text, start = caller(), self.environment.written
        self.environment.spans.append((start, start + len(text)))
        return text


class _Guards(NodeTransformer):
    """Sends what is no call through the Sandbox too: loops, `~`, lists, slices, comparisons."""

    def __init__(self, environment: Sandbox):
        self.environment = environment

    def _filtered(self, node: Any, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._filtered(node.iter, "_turns")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        values = nodes.List(node.nodes, lineno=node.lineno)
        return self._filtered(self._filtered(values, "_sized"), "_joined")

    def visit_literal(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") != "load"
        constant = all(isinstance(item, nodes.Const) for item in node.items)
        return node if is_target or constant else self._filtered(node, "_sized")

    visit_List = visit_Tuple = visit_Dict = visit_literal

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = self._filtered(node.node, "_sliced")
        return node

    def visit_Operand(self, node: nodes.Operand) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.expr, nodes.Const):
            node.expr = self._filtered(node.expr, "_sized")
        return node


class _TemplateDict:
    """Python's `dict` for templates: called, or for its `fromkeys`; not its other methods."""

    fromkeys = staticmethod(dict.fromkeys)

    def __call__(self, *args: Any, **options: Any) -> dict[Any, Any]:
        return dict(*args, **options)


class _TemplateNamespace(Namespace):
    """A namespace without names that begin with an underscore, which Python keeps for itself."""

    def __init__(*args: Any, **options: Any) -> None:
        values = dict(*args[1:], **options)
        for name in values:
            _check_name(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}")


def _length(value: Any) -> int:
    return len(value) * (1 if isinstance(value, str) else ITEM) if hasattr(value, "__len__") else 1


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if WIDE_PERCENT.search(format):
        raise TooMuchWork("it makes dates of any width")
    return datetime.now().strftime(format)
