"""YAML with a place for everything: plain data, and the line and column of every key and value.

Only what a spec needs: mappings, sequences, scalars. Aliases are bounded, duplicate keys refused, nothing is executed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from ccompile.errors import Problem, SpecError

Path = tuple[str | int, ...]
MAX_BYTES = 1 << 20
MAX_NODES = 100_000  # after expanding aliases
MAX_DEPTH = 32


@dataclass(frozen=True)
class Mark:
    """Where something stands: 1-based line and column, and the width of the token; or the command line option."""

    line: int = 0
    column: int = 0
    width: int = 1
    option: str = ""


@dataclass
class Document:
    """A parsed text: `data` is plain, `keys` and `values` hold the marks by path from the root."""

    name: str
    text: str
    data: Any = None
    keys: dict[Path, Mark] = field(default_factory=dict)
    values: dict[Path, Mark] = field(default_factory=dict)

    def problem(self, path: Path, message: str, hint: str = "", *, at_key: bool = False) -> Problem:
        """Return a Problem located at `path`, or at its nearest ancestor that has a place, with the line shown."""
        mark = next((m for p in _ancestors(path) if (m := self._mark(p, at_key and p == path))), Mark(1, 1))
        return self.problem_at(mark, path, message, hint)

    def problem_at(self, mark: Mark, path: Path, message: str, hint: str = "") -> Problem:
        """Return a Problem located at `mark`, with the line shown."""
        message = f"{dotted(path)}: {message}" if path else message
        if mark.option:
            return Problem(message, mark.option, hint)
        lines = self.text.splitlines()
        shown = ""
        if 0 < mark.line <= len(lines) and len(lines[mark.line - 1]) <= 200:
            shown = f"    {lines[mark.line - 1]}\n    {' ' * (mark.column - 1)}{'^' * max(1, mark.width)}\n"
        where = f"{self.name}:{mark.line}:{mark.column}"
        return Problem(message, where, (shown + hint).rstrip("\n"), (mark.line, mark.column))

    def _mark(self, path: Path, at_key: bool) -> Mark | None:
        return (self.keys.get(path) if at_key else None) or self.values.get(path) or self.keys.get(path)


def dotted(path: Path) -> str:
    """Return a path as people write it.

    >>> dotted(("passes", 2, "split-svd", "enrgy"))
    'passes[2].split-svd.enrgy'
    """
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _ancestors(path: Path) -> list[Path]:
    return [path[:length] for length in range(len(path), -1, -1)]


def parse(text: str, name: str) -> Document:
    """Return the document. Raises SpecError with the place: not YAML, several documents, duplicate keys, too large."""
    document = Document(name, text)
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise SpecError(f"the text is larger than {MAX_BYTES >> 10} KiB", name, "A spec is a page, not a data set.")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError as error:
        raise SpecError("nested too deeply", name) from error
    except yaml.MarkedYAMLError as error:
        raise _syntax(document, error) from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        mark = Mark(before.count("\n") + 1, error.position - before.rfind("\n"))
        message = f"the character U+{error.character:04X} is not allowed in YAML"
        raise SpecError.of([document.problem_at(mark, (), message, "Remove it.")]) from error
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(f"not YAML: {' '.join(str(error).split())[:200]}", name) from error
    if root is None:
        hint = "Start with `version: 1` and a list of `passes`."
        raise SpecError.of([document.problem_at(Mark(1, 1), (), "the spec is empty", hint)])
    builder = _Builder(document)
    document.data = builder.build(root, (), 0)
    if builder.problems:
        raise SpecError.of(builder.problems)
    return document


def _syntax(document: Document, error: yaml.MarkedYAMLError) -> SpecError:
    mark = error.problem_mark or error.context_mark
    place = Mark(mark.line + 1, mark.column + 1) if mark is not None else Mark(1, 1)
    text = f"{error.context or ''} {error.problem or ''}"
    hint = next((hint for part, hint in _HINTS.items() if part in text), "")
    message = str(error.problem or error.context).removeprefix("but ")
    if message.startswith(("expected <block end>", "expected '<document start>'")):
        message, hint = _unexpected(document, place, message.rpartition("found ")[2].strip("'"))
    return SpecError.of([document.problem_at(place, (), f"not YAML: {message}", hint)])


def _unexpected(document: Document, place: Mark, found: str) -> tuple[str, str]:
    """Return message and hint for a token where a list or mapping should go on or end."""
    if found in ("]", "}", ","):
        return f"this `{found}` belongs to no bracket or brace", "Remove it, or open one before it."
    line = next(iter(document.text.splitlines()[place.line - 1 :]), "")
    if line[: place.column - 1].strip():
        return "the value ends before this", "Quote the whole text, or remove the rest of the line."
    hint = "Is this line indented as far as the others of its list or mapping?"
    return "this line does not fit the indentation above it", hint


_HINTS = {  # what the parser says -> what to do
    "\\t": "YAML indents with spaces, not with tabs.",
    "single document": "A spec is one document: remove the second `---`.",
    "mapping values are not allowed": "Is the line above complete? Quote text with a `: ` in it.",
    "could not find expected ':'": "Write `key: value`, with a space behind the colon.",
    "expected ',' or": "Is a bracket, brace or comma missing before this?",
    "undefined alias": "Quote text that starts with `*`.",
}
_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class _Builder:
    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[Problem] = []
        self.count = 0
        self.constructor = yaml.constructor.SafeConstructor()

    def build(self, node: yaml.Node, path: Path, depth: int) -> Any:
        self.count += 1
        if self.count > MAX_NODES:
            raise SpecError(f"more than {MAX_NODES} entries after expanding aliases", self.document.name)
        if depth > MAX_DEPTH:
            problem = self.document.problem_at(_mark(node), (), f"nested more than {MAX_DEPTH} deep")
            raise SpecError.of([problem])
        self.document.values.setdefault(path, _mark(node))
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _PLAIN_TAGS:
            self._refuse_tag(node, path)
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, index), depth + 1) for index, item in enumerate(node.value)]
        return self._scalar(node, path)

    def _refuse_tag(self, node: yaml.Node, path: Path) -> None:
        name = node.tag.removeprefix("tag:yaml.org,2002:")
        self.problems.append(self.document.problem(path, f"the tag `{name}` is not allowed", "Write plain values."))

    def _mapping(self, node: yaml.MappingNode, path: Path, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                message = "a key is a word, not a list or mapping"
                self.problems.append(self.document.problem_at(_mark(key_node), path, message))
                continue
            key = str(key_node.value)
            here = (*path, key)
            if key in found:
                first = self.document.keys[here].line
                self.document.keys[here] = _mark(key_node)
                self.problems.append(
                    self.document.problem(here, f"given twice, first in line {first}", "Keep one.", at_key=True)
                )
                continue
            self.document.keys[here] = _mark(key_node)
            found[key] = self.build(value_node, here, depth + 1)
        return found

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        if bad := next((char for char in node.value if char == "\0" or "\ud800" <= char <= "\udfff"), ""):
            self.problems.append(self.document.problem(path, f"U+{ord(bad):04X} is no character of a text"))
            return None
        if node.tag not in self.constructor.yaml_constructors:
            self._refuse_tag(node, path)
            return None
        try:
            value = self.constructor.construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            message = getattr(error, "problem", None) or str(error).partition(";")[0]
            self.problems.append(self.document.problem(path, f"cannot be read: {message}"))
            return None
        return value if isinstance(value, str | int | float | bool | None) else str(node.value)


def _mark(node: yaml.Node) -> Mark:
    start, end = node.start_mark, node.end_mark
    width = end.column - start.column if end.line == start.line else 1
    return Mark(start.line + 1, start.column + 1, max(1, width))
