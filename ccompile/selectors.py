"""Which nodes a step may act on: globs on names and ops, and the little language of `where`. Nothing is executed."""

from __future__ import annotations

import ast
import fnmatch
import operator
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from ccompile.declaration import Declaration

Facts = Mapping[str, float | str]
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
FACTS = ("groups", "kernel", "stride", "dilation", "in_channels", "out_channels", "params")


class Selector(Declaration):
    """Nodes by glob on their name, glob on their op, and a condition on their facts; all that is given must hold."""

    name: str = Field("*", description="glob on the node's name", examples=["/fc*"])
    op: str = Field("*", description="glob on the node's op type", examples=["Conv"])
    where: str | None = Field(
        None,
        max_length=200,
        description=f"a condition on {', '.join(FACTS)}, with < <= > >= == != and or not",
        examples=["groups > 1"],
    )

    @field_validator("where")
    @classmethod
    def _parses(cls, text: str | None) -> str | None:
        if text is not None:
            _holds(_parse_condition(text), dict.fromkeys(FACTS, 1.0))
        return text

    def matches(self, facts: Facts) -> bool:
        """Return whether a node with these facts is meant; a fact that the node lacks makes `where` false."""
        if not (fnmatch.fnmatchcase(str(facts["name"]), self.name) and fnmatch.fnmatchcase(str(facts["op"]), self.op)):
            return False
        if self.where is None:
            return True
        condition = _parse_condition(self.where)
        needed = {leaf.id for leaf in ast.walk(condition) if isinstance(leaf, ast.Name)}
        return needed <= facts.keys() and bool(_holds(condition, facts))

    def __str__(self) -> str:
        parts = [self.name] if self.name != "*" or (self.op == "*" and not self.where) else []
        parts += [f"op {self.op}"] if self.op != "*" else []
        parts += [self.where] if self.where else []
        return ", ".join(parts)


def _parse_condition(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"`{text}` is not a condition such as `groups > 1`") from error


def _holds(node: ast.expr, facts: Facts) -> bool:
    """Evaluate the little language of `where`: comparisons of names and numbers, and/or/not; nothing else."""
    if isinstance(node, ast.BoolOp):
        found = [_holds(value, facts) for value in node.values]
        return all(found) if isinstance(node.op, ast.And) else any(found)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _holds(node.operand, facts)
    if isinstance(node, ast.Compare) and all(type(op) in _COMPARE for op in node.ops):
        values = [_operand(value, facts) for value in (node.left, *node.comparators)]
        return all(_COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, values[:-1], values[1:], strict=True))
    if isinstance(node, ast.Name | ast.Constant):
        _operand(node, facts)
        raise ValueError(f"`{ast.unparse(node)}` alone says nothing: compare it, for example `groups > 1`")
    raise _not_allowed(node)


def _operand(node: ast.expr, facts: Facts) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in FACTS:
            raise ValueError(f"`{node.id}` is not a fact about a node; there are: {', '.join(FACTS)}")
        return facts[node.id]
    raise _not_allowed(node)


def _not_allowed(node: ast.expr) -> ValueError:
    return ValueError(f"`{ast.unparse(node)}` is not allowed here: compare {', '.join(FACTS)} with numbers")


def _as_selector(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


SelectorOption = Annotated[Selector, BeforeValidator(_as_selector, json_schema_input_type=str | Selector)]
