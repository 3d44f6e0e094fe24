"""The site in a real browser, from a server: no other host is asked, search finds, and phones need no scrolling."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from pages import needs_chromium, visit
from runs import ROOT

pytestmark = needs_chromium
PHONE = 390
SEEN = ["index.html", "tutorial.html", "reference/spec.html", "reference/passes/split-svd.html", "guides/choosing.html"]
HARNESS = """<!doctype html><title></title><body>{frames}<script>
setTimeout(() => {{
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(
    (frame) => frame.contentDocument.documentElement.scrollWidth));
}}, 2500);
</script></body>"""


@dataclass
class Host:
    """A server of a folder on this machine, and what pages from it asked of other hosts."""

    folder: Path
    url: str = ""
    refused: list[str] = field(default_factory=list)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """The site, served with a policy under which a browser tells what it was asked to fetch from elsewhere."""
    found = Host(tmp_path / "site")

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(found.folder))

        def end_headers(self) -> None:
            policy = "default-src 'self' 'unsafe-inline' data: blob:; report-uri /told"
            self.send_header("Content-Security-Policy", policy)
            super().end_headers()

        def do_POST(self) -> None:
            told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found.refused.append(told["csp-report"]["blocked-uri"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield found
    server.shutdown()


@pytest.fixture
def site(host: Host, monkeypatch: pytest.MonkeyPatch) -> Host:
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(host.folder)))
    return host


def title_of(dom: str) -> str:
    return dom.partition("<title>")[2].partition("</title>")[0]


def test_pages_ask_no_other_host_fit_a_phone_and_can_be_searched(site: Host, tmp_path: Path) -> None:
    """One test: the site takes seconds to build, and the browser to start."""
    frames = "".join(f'<iframe style="width:{PHONE}px;height:700px" src="{uri}"></iframe>' for uri in SEEN)
    (site.folder / "harness.html").write_text(HARNESS.format(frames=frames))
    widths = json.loads(title_of(visit(f"{site.url}/harness.html", tmp_path)))
    assert widths == [PHONE] * len(SEEN)
    found = visit(f"{site.url}/index.html?q=biclusters", tmp_path)
    assert "reference/passes/split-biclusters.html" in found.partition('class="md-search-result__list"')[2]
    assert site.refused == []


def test_a_page_that_asks_another_host_is_told(host: Host, tmp_path: Path) -> None:
    host.folder.mkdir()
    (host.folder / "bad.html").write_text('<!doctype html><img src="http://example.invalid/x.png"><img src="x.png">')
    visit(f"{host.url}/bad.html", tmp_path)
    assert host.refused == ["http://example.invalid/x.png"]
