"""Evidence as one HTML page that needs nothing else: no other file, no network, no build.

Names in a model are whatever its author wrote, so everything is escaped: jinja2 does it for text, `_script` for the
data that the page's own script reads, and that script writes text nodes only. The page forbids itself all else by its
content security policy.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib.resources import files

from jinja2 import BaseLoader, Environment, StrictUndefined, Template
from markupsafe import Markup

from ccompile import page_summary as summary
from ccompile.evidence import Evidence
from ccompile.page_data import page_data
from ccompile.record import finite
from ccompile.report import size

STYLES = ("theme.css", "page.css", "tables.css")
SCRIPTS = ("core.js", "tables.js", "charts.js", "drawing.js", "main.js")


def render(evidence: Evidence) -> str:
    """Return the page; equal evidence gives equal text."""
    style, script = ("\n".join(map(_part, names)) for names in (STYLES, SCRIPTS))
    return _template().render(
        e=evidence,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'",
        data=_script(page_data(evidence)),
        headline=summary.headline(evidence),
        gains=summary.gains(evidence),
        losses=summary.losses(evidence),
        gates=[(gate, summary.margin(gate)) for gate in evidence.gates],
        columns=summary.columns(evidence),
        source=summary.source_cells(evidence),
        rows=list(summary.rows(evidence)),
    )


def _part(name: str) -> str:
    return files("ccompile").joinpath("templates", name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(
        loader=BaseLoader(), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": summary.number, "size": size}
    return environment.from_string(_part("page.html"))


def _hash(text: str) -> str:
    """Return the source expression that allows exactly this inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _script(data: object) -> Markup:
    """Return data as JSON that may stand in a script element, whatever its texts hold."""
    text = json.dumps(finite(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
