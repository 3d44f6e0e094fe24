"""Evidence to draw pages of: small, large, hostile; and the page in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ccompile.core import CostReport
from ccompile.evidence import (
    CandidateRecord,
    CostRecord,
    DataRecord,
    Evidence,
    FileRecord,
    GateRecord,
    SiteRecord,
    SkipRecord,
    StepRecord,
)
from ccompile.snapshots import ChangeRecord, LayerRecord, NodeRecord, weight_record
from ccompile.tolerance import Tolerance

if TYPE_CHECKING:
    from pathlib import Path

FILE = FileRecord(name="net.onnx", digest="5e", bytes=4000)
EVIL = "</script><script>boom()</script><img src=x onerror=boom()>&amp;\"'`${1}"


def cost(share: float) -> CostRecord:
    """What a net costs, as a share of 1000."""
    n = round(1000 * share)
    return CostRecord.of(CostReport(n, n, n, n, 4 * n, 4 * n, 4 * n, n, n * 1e-6))


def layer(name: str, share: float = 1.0, drift: float | None = None) -> LayerRecord:
    n = round(100 * share)
    return LayerRecord(
        node=name, op="Gemm", params=n, macs=n, stored_bytes=4 * n, moved_bytes=n, seconds=n * 1e-6, drift=drift
    )


def node(name: str, index: int, op: str = "Gemm") -> NodeRecord:
    """A node in a chain: it reads v{index} and makes v{index + 1}."""
    return NodeRecord(name=name, op=op, reads=(f"v{index}",), makes=(f"v{index + 1}",), weights=("float 8x8",))


def split(name: str, index: int) -> tuple[NodeRecord, NodeRecord]:
    """What such a node is split into."""
    first, last = f"{name}/V", f"{name}/U"
    return (
        NodeRecord(name=first, op="Gemm", reads=(f"v{index}",), makes=(f"{name}/h",), weights=("float 2x8",)),
        NodeRecord(name=last, op="Gemm", reads=(f"{name}/h",), makes=(f"v{index + 1}",), weights=("float 8x2",)),
    )


def curve(chosen: float) -> tuple[CandidateRecord, ...]:
    choices = [(1.0, 0.5, 25.0), (2.0, 0.1, 50.0), (3.0, 0.01, 75.0), (0.0, 0.0, 100.0)]
    return tuple(
        CandidateRecord(
            technique="split-svd" if rank else "none",
            strength=rank,
            error=error,
            impact=None,
            cost=price,
            chosen=rank == chosen,
            unit="macs",
        )
        for rank, error, price in choices
    )


def site(name: str, index: int) -> SiteRecord:
    W = np.random.default_rng(index % 7).standard_normal((1, 8, 8))
    return SiteRecord(
        nodes=(f"{name}/V", f"{name}/U"),
        note=f"rank 2 of 8, {index / 1e6:g} lost",
        relative_error=(index * 37 % 101) / 1000,
        candidates=curve(2.0),
        output=f"v{index + 1}",
        weight=weight_record(W, None),
    )


def split_step(names: list[str], index: int = 1, verdict: Any = "kept", **changes: Any) -> StepRecord:
    """A step that splits every second layer of a chain and leaves the others alone."""
    acted = [(name, at) for at, name in enumerate(names) if at % 2 == 0]
    left = [name for at, name in enumerate(names) if at % 2]
    fields: dict[str, Any] = {
        "index": index,
        "name": "split-svd",
        "options": {"error": 0.1},
        "contract": "lossy",
        "tolerance": Tolerance(argmax=0.9),
        "verdict": verdict,
        "reason": "",
        "applied": tuple(site(name, at) for name, at in acted),
        "skipped": tuple(SkipRecord(node=name, reason="8 x 8 is too small", candidates=curve(0.0)) for name in left),
        "against_previous": None,
        "against_source": None,
        "metrics": {"top1": 0.87},
        "cost": cost(0.5),
        "nodes": len(names) + len(acted),
        "ops": {"Gemm": len(names)},
        "change": ChangeRecord(
            removed=tuple(name for name, _ in acted), changed=tuple(n for name, at in acted for n in split(name, at))
        ),
    }
    return StepRecord(**fields | changes)


def evidence(names: list[str], **changes: Any) -> Evidence:
    """A compile of a chain of layers of these names by one `split_step`."""
    split_names = [(name, at % 2 == 0) for at, name in enumerate(names)]
    after = [
        layer(n, 0.25, 0.01) for name, acted in split_names for n in ((f"{name}/V", f"{name}/U") if acted else (name,))
    ]
    fields: dict[str, Any] = {
        "verdict": "ok",
        "source": FILE,
        "output": FileRecord(name="out.onnx", digest="0a", bytes=2000),
        "spec": FileRecord(name="spec.yaml", digest="11", bytes=100),
        "target": "generic-cpu",
        "seed": 0,
        "versions": {"ccompile": "1.2.3"},
        "notes": (),
        "calibration": None,
        "verification": DataRecord(source="npz v.npz, 8 samples", digest="77", samples=8),
        "source_cost": cost(1),
        "source_metrics": {"top1": 0.9},
        "steps": (split_step(names),),
        "final": None,
        "survey": {},
        "gates": (GateRecord(name="macs", limit=0.6, value=0.5, holds=True, detail="0.5 of the source's"),),
        "graph": tuple(node(name, at) for at, name in enumerate(names)),
        "source_layers": tuple(layer(name) for name in names),
        "layers": tuple(after),
    }
    return Evidence(**fields | changes)


# ---------------------------------------------------------------------------------------------- the browser

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: chromium)")
_WATCH = """
const problems = [];
addEventListener("error", (event) => problems.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => problems.push("blocked " + event.violatedDirective));
"""
_TELL = """
setTimeout(async () => {
  let found;
  try { found = await (async () => { %s })(); } catch (error) { problems.push(String(error)); }
  parent.postMessage(JSON.stringify({ found, problems }), "*");
}, 300);
"""
_HARNESS = """<!doctype html><body style="margin:0">
<iframe style="border:0;width:{width}px;height:{height}px" src="page.html"></iframe>
<script>addEventListener("message", (event) => {{ document.title = event.data; }});</script></body>"""


@dataclass(frozen=True)
class Seen:
    """What a script returned in a page, what went wrong there, and what the browser wrote to its log."""

    found: Any
    problems: list[str]
    log: list[str]


def browse(page: str, script: str, folder: Path, width: int = 1200, height: int = 900) -> Seen:
    """Open a page in Chromium, in a frame of that size, and run a script in it, which may await and return JSON."""
    (folder / "page.html").write_text(_with_scripts(page, _WATCH, _TELL % script), encoding="utf-8")
    (folder / "harness.html").write_text(_HARNESS.format(width=width, height=height))
    done = _chromium(folder, width, height, "--virtual-time-budget=6000", "--dump-dom")
    title = done.stdout.partition("<title>")[2].partition("</title>")[0]
    assert title, f"the page said nothing: {done.stderr[-2000:]}"
    told = json.loads(title.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return Seen(told.get("found"), told["problems"], [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def screenshot(page: str, folder: Path, width: int, height: int) -> Path:
    """Return a picture of a page in a frame of that size."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    (folder / "harness.html").write_text(_HARNESS.format(width=width, height=height))
    _chromium(folder, width, height, "--virtual-time-budget=4000", f"--screenshot={folder / 'shot.png'}")
    return folder / "shot.png"


def visit(url: str, folder: Path) -> str:
    """Return what a page's document is a few seconds after it was opened."""
    return _chromium(folder, 1366, 900, "--virtual-time-budget=5000", "--dump-dom", url=url).stdout


def _chromium(folder: Path, width: int, height: int, *options: str, url: str = "") -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    quiet = ("--disable-gpu", "--disable-background-networking", "--no-first-run", "--hide-scrollbars")
    window = f"--window-size={max(width, 500)},{height}"
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [CHROMIUM, "--headless=new", "--no-sandbox", *quiet, profile, window, "--enable-logging=stderr", *options]
    url = url or (folder / "harness.html").resolve().as_uri()
    return subprocess.run([*command, url], capture_output=True, text=True, timeout=120, check=True)


def _with_scripts(page: str, first: str, last: str) -> str:
    """Return the page with a script before all others and one at its end, which its policy then lets run."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (first, last))
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    assert "script-src &#39;" in page
    page = page.replace("script-src &#39;", f"script-src {allowed} &#39;", 1)
    page = page.replace("<body>", f"<body><script>{first}</script>", 1)
    return page.replace("</body>", f"<script>{last}</script></body>", 1)
