"""Keys of declarations as tables in Markdown: what a key takes, its limits, its default, what it means, an example."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from ccompile import reference, registry
from ccompile.spec import schema

# Declarations that specs are made of, in the order in which a reader meets them, and the headings they stand under.
# Others come behind, under their names.
_FIRST = {
    "DataSpec": "data",
    "DataSource": "data source",
    "Preprocess": "preprocess",
    "Synthetic": "synthetic",
    "Selector": "selector",
    "Tolerance": "tolerance",
    "Budget": "budget",
    "Gates": "gates",
    "MetricGate": "metric gate",
}


@cache
def spec_schema() -> dict[str, Any]:
    """Return the JSON Schema of specs."""
    return schema()


@cache
def target_parts() -> tuple[str, ...]:
    """Return the declarations that a target is made of, the target first."""
    found = ["Target"]
    for name in found:  # grows while it is read
        found += [other for other in _named_in(spec_schema()["$defs"][name]) if other not in found]
    return tuple(found)


@cache
def spec_parts() -> dict[str, str]:
    """Return the declarations of a spec but passes and targets, with their headings."""
    passes = {kind.__name__ for kind in registry.passes().values()}
    others = [name for name in spec_schema()["$defs"] if name not in (*passes, *target_parts(), *_FIRST)]
    return _FIRST | {name: name.lower() for name in others}


def _named_in(part: Mapping[str, Any]) -> list[str]:
    """Return the declarations that a part of the schema refers to, sorted."""
    return sorted(set(re.findall(r"#/\$defs/(\w+)", json.dumps(part))))


# What a reader would write, where neither the declaration nor its type says so; of a tuple, the first that fits.
_EXAMPLES: dict[str, Any] = {
    "version": 1,
    "target": "x86-64-avx512-vnni",
    "passes": ["tidy-graph", {"split-svd": {"error": 0.02, "tolerance": {"argmax": 0.98}}}],
    "gates": {"stored_bytes": 0.7, "argmax": 0.99},
    "metric": {"top1": {"drop": 0.005}},
    "npz": "calibration.npz",
    "test_data": "models/net",
    "images": "photos",
    "labels": "label",
    "samples": 256,
    "batch": 8,
    "input": "pixels",
    "preprocess": {"resize": 256, "crop": 224},
    "resize": 256,
    "crop": 224,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "atol": 0.01,
    "rtol": 0.01,
    "relative_l2": 0.05,
    "cosine": 0.999,
    "argmax": 0.98,
    "drop": 0.005,
    "min": (0.9, 7),
    "max": 21,
    "energy": 0.98,
    "error": 0.02,
    "rank": 32,
    "bits": 4,
    "layers": {"/fc*": 0.5},
    "ridge": 0.001,
    "pattern": "2:4",
    "among": ["prune-channels", "split-svd", "split-spatial"],
    "conv": {"float32": 32, "int8": 64},
    "conv1x1": {"float32": 28, "int8": 56},
    "depthwise": {"float32": 8},
    "ragged": {"int8": 2.4},
    "gemm": {"float32": 32, "int8": 64},
    "gemv": {"float32": 16},
    "recurrent": {"float32": 12},
    "elementwise": {"float32": 1},
    "align": ({"float32": {"out_channels": 8}}, 8),
    "name": "my-board",
    "description": "my board, one core",
    "opset": {"min": 7, "max": 21},
    "lacks": ["LSTM"],
    "domains": ["com.microsoft"],
    "fused": ["BatchNormalization", "Relu"],
    "bandwidth_gb_s": 15.0,
    "node_overhead_us": 0.5,
    "ops": ["Conv", "Relu", "Gemm"],
    "dtypes": ["float32", "int8"],
    "op": "Add",
    "carries": ["Relu"],
    "in_channels": 4,
    "out_channels": 16,
    "session_overhead_us": 5.0,
    "inputs": 4,
    "outputs": 4,
    "seed": 1,
    "size": 8,
    "columns": 128,
    "outliers": 0.01,
    "least": 256,
    "margin": 0.1,
    "min_kernel": 7,
    "tiles": ["4x1", "4x4"],
    "percentile": 99.9,
    "methods": ["bias"],
    "shrink": 0.5,
    "length": 2.0,
    "swaps": 2,
    "growth": 0,
    "scale": 1.0,
    "low": -1.0,
    "high": 2.0,
    "integers": [0, 1000],
}
_LEFT_OUT = {"type": "null"}


def options_table(declared: Mapping[str, Any], defs: Mapping[str, Any], prefix: str, up: str = "") -> str:
    """Return a table of a declaration's keys in Markdown: value and limits, default, meaning, example.

    declared: its JSON Schema. Each key has an anchor, after `prefix`. `up` leads from the page to the reference.
    """
    rows = ["| key | value | default | meaning | example |", "|---|---|---|---|---|"]
    for name, entry in declared["properties"].items():
        default = "none" if entry.get("default") is None else f"`{flow(entry['default'])}`"
        default = "required" if name in declared.get("required", []) else default
        sample = flow({name: example(name, entry, defs)})
        cells = (
            f'<a id="{prefix}{name}"></a>`{name}`',
            "list of [steps](passes/index.md)" if name == "passes" else _value(entry, up),
            default,
            entry.get("description", ""),
            f"`{sample}`",
        )
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    table = "\n".join(rows)
    return f'<div class="options" markdown>\n\n{table}\n\n</div>'


def _value(entry: Mapping[str, Any], up: str) -> str:
    """Return what a key takes in words; declarations lead to where their own keys are."""
    text = reference.kind_of(entry).replace("|", "or").replace("<", "&lt;")
    for name in _named_in(entry):
        page = "targets.md" if name in target_parts() else "spec.md"
        title = spec_parts().get(name, name.lower())
        text = re.sub(rf"\b{name.lower()}\b", f"[{title}]({up}{page}#{title.replace(' ', '-')})", text)
    return text


def example(name: str, entry: Mapping[str, Any], defs: Mapping[str, Any]) -> Any:
    """Return a value that a key takes: declared, well known, or of its type and limits."""
    if entry.get("examples"):
        return entry["examples"][0]
    known = _EXAMPLES.get(name)
    for candidate in (*(known if isinstance(known, tuple) else (known,)), _of_type(entry, defs)):
        if candidate is not None and _fits(candidate, entry, defs):
            return candidate
    raise LookupError(f"no example fits `{name}`: give its Field `examples=[...]`")


def _of_type(entry: Mapping[str, Any], defs: Mapping[str, Any]) -> Any:
    """Return a value of a type that says something: another than the default where there is a choice."""
    if "$ref" in entry:
        return _of_object(str(entry["$ref"]).rpartition("/")[2], defs)
    if "anyOf" in entry:
        return next(
            value for part in entry["anyOf"] if part != _LEFT_OUT and (value := _of_type(part, defs)) is not None
        )
    default = entry.get("default")
    if "const" in entry:
        return entry["const"]
    if "enum" in entry:
        return next((value for value in entry["enum"] if value != default), default)
    kind = entry.get("type")
    if kind == "boolean":
        return not default
    if kind == "array":
        return default or [_of_type(entry.get("items", {}), defs) or "/head/*"]
    if kind == "object":
        return default or {"/fc*": _of_type(entry.get("additionalProperties", {}), defs)}
    if kind in ("number", "integer"):
        return default if default is not None else _of_number(entry)
    return default or "/head/*"


def _of_object(name: str, defs: Mapping[str, Any]) -> Any:
    """Return an example of a declaration: all that it needs, else its first key."""
    properties = defs[name]["properties"]
    needed = defs[name].get("required", [])
    if not needed and all(
        "default" in properties[key] and properties[key]["default"] is not None for key in properties
    ):
        return {}
    return {key: example(key, properties[key], defs) for key in (needed or list(properties)[:1])}


def _of_number(entry: Mapping[str, Any]) -> float:
    """Return the middle of a short range, else its least value."""
    low, high = (
        entry.get("minimum", entry.get("exclusiveMinimum", 0)),
        entry.get("maximum", entry.get("exclusiveMaximum")),
    )
    if entry["type"] == "integer":
        return int(low) if low and low > 0 else 1
    return (low + high) / 2 if high is not None and high <= 1 else float(low + 1)


def _fits(value: Any, entry: Mapping[str, Any], defs: Mapping[str, Any]) -> bool:
    """Return whether a value is of the JSON type that a key takes (tests validate examples in full)."""
    if "$ref" in entry:
        known = defs[str(entry["$ref"]).rpartition("/")[2]].get("properties", {})
        return isinstance(value, dict) and value.keys() <= known.keys()
    if "anyOf" in entry:
        return any(_fits(value, part, defs) for part in entry["anyOf"])
    if "const" in entry or "enum" in entry:
        return value in entry.get("enum", [entry.get("const")])
    kinds: dict[str, type | tuple[type, ...]] = {
        "number": (int, float),
        "integer": int,
        "string": str,
        "boolean": bool,
        "array": list,
        "object": dict,
    }
    if entry.get("type") == "array" and isinstance(value, list) and "items" in entry:
        return all(_fits(part, entry["items"], defs) for part in value)
    if (
        entry.get("type") == "object"
        and isinstance(value, dict)
        and isinstance(entry.get("additionalProperties"), dict)
    ):
        return all(_fits(part, entry["additionalProperties"], defs) for part in value.values())
    kind = kinds.get(str(entry.get("type")))
    return kind is not None and isinstance(value, kind)


def flow(value: Any) -> str:
    """Return a value as YAML in one line.

    >>> flow({"only": ["/fc*"], "error": 0.02})
    'only: [/fc*], error: 0.02'
    """
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).strip().removesuffix("\n...")
    return text[1:-1] if isinstance(value, dict) and value else text
