"""What a chat template reads of what it is given: it passes over all else without a word.

Invariant: a template is parsed for this, never run.
"""

from __future__ import annotations

from functools import lru_cache

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import SandboxedEnvironment


def variables_read(template: str | None) -> frozenset[str] | None:
    """The variables that it reads; None where it cannot be parsed, which rendering will say
    better."""
    parsed = _parsed_template(template)
    return None if parsed is None else frozenset(meta.find_undeclared_variables(parsed))


@lru_cache(maxsize=16)
def fields_read(template: str | None) -> frozenset[str]:
    """The names under which it looks into messages and other values: `message.content`,
    `message['content']`, `message.get('content')`, `'content' in message`."""
    parsed = _parsed_template(template)
    if parsed is None:
        return frozenset()
    names = {node.attr for node in parsed.find_all(nodes.Getattr)}
    looked_up: list[nodes.Node] = [node.arg for node in parsed.find_all(nodes.Getitem)]
    for call in parsed.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr == "get":
            looked_up += call.args[:1]
    looked_up += [
        compared.expr
        for compared in parsed.find_all(nodes.Compare)
        if any(operand.op in ("in", "notin") for operand in compared.ops)
    ]
    names |= {
        node.value
        for node in looked_up
        if isinstance(node, nodes.Const) and isinstance(node.value, str)
    }
    return frozenset(names)


class _GenerationTag(Extension):
    """`{% generation %}`, with which templates mark the assistant's part."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@lru_cache(maxsize=16)
def _parsed_template(template: str | None) -> nodes.Template | None:
    environment = SandboxedEnvironment(extensions=[_GenerationTag, loopcontrols])
    try:
        return None if template is None else environment.parse(template)
    except TemplateError:
        return None
