"""Imports only downwards; passes know neither each other nor the runtime; every pass says what STYLE asks for."""

import ast
import sys
from pathlib import Path

import pytest

import ccompile
from ccompile import registry
from ccompile.core import Pass

ROOT = Path(ccompile.__file__).parent
# Each module may import those in the lines above its own, and those in its own line.
LAYERS = [
    ["ccompile", "ccompile.errors", "ccompile.specs"],
    [
        "ccompile.disk",
        "ccompile.blas",
        "ccompile.executor",
        "ccompile.wire",
        "ccompile.marks",
        "ccompile.declaration",
        "ccompile.record",
        "ccompile.weakening",
        "ccompile.decisions",
        "ccompile.store",
    ],
    ["ccompile.numerics", "ccompile.numerics.*"],
    ["ccompile.moments", "ccompile.ledger"],
    ["ccompile.selectors", "ccompile.validation", "ccompile.tolerance"],
    ["ccompile.overrides"],
    ["ccompile.core"],
    ["ccompile.curves"],
    ["ccompile.coders", "ccompile.views", "ccompile.positions"],
    ["ccompile.files", "ccompile.see_through", "ccompile.splice"],
    ["ccompile.container", "ccompile.choosing"],
    ["ccompile.graph"],
    ["ccompile.onnx_io"],
    ["ccompile.identity"],
    ["ccompile.analysis", "ccompile.analysis.*"],
    [
        "ccompile.surgery",
        "ccompile.fitting",
        "ccompile.importance",
        "ccompile.stages",
        "ccompile.impacts",
        "ccompile.decoding",
        "ccompile.forms",
        "ccompile.storage",
        "ccompile.opsets",
        "ccompile.hashed",
        "ccompile.cropping",
        "ccompile.convolution",
        "ccompile.emitting",
        "ccompile.turning",
    ],
    [
        "ccompile.qdq",
        "ccompile.code_moves",
        "ccompile.older_opsets",
        "ccompile.equalising",
        "ccompile.winograd_form",
        "ccompile.fourier_forms",
        "ccompile.lowering",
        "ccompile.merging",
        "ccompile.tidying",
        "ccompile.noops",
        "ccompile.folding",
        "ccompile.absorbing",
        "ccompile.repeats",
        "ccompile.pooling",
    ],
    ["ccompile.quantising", "ccompile.merging_products", "ccompile.products"],
    ["ccompile.split_prices", "ccompile.cutting", "ccompile.integer_fits"],
    ["ccompile.split_fits"],
    ["ccompile.layerwise"],
    ["ccompile.splitting", "ccompile.coding"],
    ["ccompile.noise_ranks"],
    ["ccompile.joint"],
    ["ccompile.passes", "ccompile.passes.*"],
    ["ccompile.registry", "ccompile.acting"],
    ["ccompile.tables"],
    ["ccompile.target"],
    [
        "ccompile.cost_ops",
        "ccompile.cost_weights",
        "ccompile.cost_layout",
        "ccompile.cost_memory",
        "ccompile.cost_fusion",
        "ccompile.cost_shapes",
        "ccompile.cost",
    ],
    ["ccompile.sources", "ccompile.sources.*", "ccompile.data"],
    ["ccompile.runtime"],
    ["ccompile.timing", "ccompile.prices", "ccompile.probes"],
    ["ccompile.benchmarks"],
    ["ccompile.measuring"],
    ["ccompile.profiling"],
    ["ccompile.recording", "ccompile.comparison"],
    ["ccompile.walking"],
    ["ccompile.fingerprint", "ccompile.prints"],
    [
        "ccompile.metrics",
        "ccompile.sites",
        "ccompile.soundness",
        "ccompile.stats",
        "ccompile.snapshots",
        "ccompile.drift",
    ],
    ["ccompile.spec"],
    ["ccompile.evidence", "ccompile.contracts", "ccompile.request"],
    ["ccompile.cases", "ccompile.builds"],
    ["ccompile.junit"],
    ["ccompile.checks", "ccompile.checks.artifact", "ccompile.checks.data", "ccompile.checks.outputs"],
    ["ccompile.checks.today"],
    ["ccompile.provenance"],
    ["ccompile.caching", "ccompile.locking", "ccompile.depfile"],
    ["ccompile.running"],
    ["ccompile.finishing"],
    ["ccompile.pipeline", "ccompile.inspection", "ccompile.diff", "ccompile.accounting", "ccompile.packing"],
    ["ccompile.bisecting", "ccompile.api", "ccompile.pytest_plugin"],
    ["ccompile.report", "ccompile.reference", "ccompile.packing_report"],
    ["ccompile.lineage"],
    ["ccompile.page_data"],
    ["ccompile.page_summary"],
    ["ccompile.page"],
    ["ccompile.builds_report"],
    ["ccompile.commands", "ccompile.commands.*"],
    ["ccompile.cli"],
    ["ccompile.__main__"],
]


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for path in sorted(p for p in (ROOT / "passes").resolve().glob("*.py") if p.stem != "__init__"):
        found[f"ccompile.passes.{path.stem}"] = path
    return found


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_at_once(path: Path) -> set[str]:
    """Return what is imported at the top of a module."""
    nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {str(getattr(node, "module", "")) for node in nodes} | {a.name for node in nodes for a in node.names}


def layer(name: str) -> int:
    for index, patterns in enumerate(LAYERS):
        if any(name == p or (p.endswith(".*") and name.startswith(p[:-1])) for p in patterns):
            return index
    raise AssertionError(f"{name} stands in no layer: add it to LAYERS, as low as it can be")


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_downwards(name: str) -> None:
    known = modules()
    if name == "ccompile":  # the public names lead to what implements them, when they are called
        assert not {other for other in imported_at_once(known[name]) if other.startswith("ccompile")}
        return
    for other in imported(known[name]) & known.keys() - {name}:
        assert layer(other) <= layer(name), f"{name} imports {other} from above"


@pytest.mark.parametrize("name", sorted(n for n in modules() if n.startswith("ccompile.passes.")))
def test_a_pass_reaches_the_rest_only_through_its_view(name: str) -> None:
    ours = {other for other in imported(modules()[name]) if other.split(".")[0] in ("ccompile", "onnxruntime")}
    allowed = "declaration core errors graph analysis numerics surgery fitting layerwise importance impacts moments "
    allowed += (
        "splitting split_fits split_prices noise_ranks stages cutting joint coding decoding forms storage hashed "
    )
    allowed += "qdq code_moves older_opsets equalising quantising integer_fits opsets lowering "
    allowed += "convolution emitting winograd_form fourier_forms merging tidying "
    allowed += "pooling products turning noops folding absorbing repeats"
    prefixes = tuple(f"ccompile.{name}" for name in allowed.split())
    assert not {other for other in ours if other != "ccompile" and not other.startswith(prefixes)}


@pytest.mark.parametrize("name", sorted(n for n in modules() if n.startswith("ccompile.numerics.")))
def test_numerics_knows_nothing_of_the_project(name: str) -> None:
    ours = {other for other in imported(modules()[name]) if other.split(".")[0] == "ccompile"}
    assert not {other for other in ours if not other.startswith("ccompile.numerics")}


@pytest.mark.parametrize("kind", registry.passes().values(), ids=list(registry.passes()))
def test_a_pass_states_its_algebra_error_cost_and_source(kind: type[Pass]) -> None:
    doc = sys.modules[kind.__module__].__doc__ or ""
    assert doc.splitlines()[0].endswith(".")
    for section in ("\nFires:", "\nError:", "\nCost:", "\nSource:"):
        assert section in doc, f"{kind.pass_name()} has no {section.strip()}"


@pytest.mark.parametrize("kind", registry.passes().values(), ids=list(registry.passes()))
def test_every_option_is_described(kind: type[Pass]) -> None:
    for name, field in kind.model_fields.items():
        assert field.description, f"{kind.pass_name()}.{name} has no description"


def test_a_pass_is_named_after_its_file() -> None:
    for name, kind in registry.passes().items():
        assert kind.__name__ == "".join(part.capitalize() for part in name.split("-"))
        assert kind.__module__ == f"ccompile.passes.{name.replace('-', '_')}"
