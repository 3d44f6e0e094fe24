"""What mkdocs calls while it builds the site: generated pages come in, and pages take sections of other files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import site_reference
import site_source
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the page of every pass below the index of passes."""
    for entry in _entries(config.nav):
        if isinstance(entry, dict) and "Passes" in entry:
            entry["Passes"] += [site_reference.pass_uri(name) for name in site_reference.pass_names()]
    return config


def _entries(nav: Any) -> list[Any]:
    """Return all entries of a navigation, of all depths."""
    if isinstance(nav, dict):
        return [nav, *(found for value in nav.values() for found in _entries(value))]
    return [found for entry in nav for found in _entries(entry)] if isinstance(nav, list) else []


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for uri, text in site_source.generated().items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put in what the page includes."""
    return site_source.expanded(markdown, page.file.src_uri)
