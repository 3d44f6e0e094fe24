"""What a graph is, in texts and digests: its nodes one by one, its weights by name."""

from __future__ import annotations

import hashlib

import onnx_ir as ir

from ccompile import graph

_LONG = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS, ir.AttributeType.TENSOR, ir.AttributeType.TENSORS)


def node_texts(model: ir.Model) -> dict[str, str]:
    """Return each top-level node as text, by name: op(inputs; attributes) -> outputs."""
    found = {}
    for node in model.graph:
        inputs, outputs = (
            ", ".join("" if value is None else str(value.name) for value in values)
            for values in (node.inputs, node.outputs)
        )
        attributes = ", ".join(f"{name}={_text(value)}" for name, value in sorted(node.attributes.items()))
        kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        found[str(node.name)] = f"{kind}({inputs}{'; ' if attributes else ''}{attributes}) -> {outputs}"
    return found


def _text(attribute: ir.Attr) -> str:
    """Return an attribute's value; tensors and graphs, which may be large, by their digest."""
    if attribute.is_ref():
        return f"@{attribute.ref_attr_name}"
    if attribute.type in _LONG:
        return hashlib.sha256(ir.to_proto(attribute).SerializeToString(deterministic=True)).hexdigest()[:12]
    return str(attribute.value)


def structure(model: ir.Model) -> str:
    """Return the SHA-256 of everything but weights: interface, opsets, nodes in order, local functions."""
    digest = hashlib.sha256(repr((graph.signature(model), sorted(model.opset_imports.items()))).encode())
    for name, text in node_texts(model).items():
        digest.update(f"\n{name}: {text}".encode())
    for function in model.functions.values():
        digest.update(ir.to_proto(function).SerializeToString(deterministic=True))
    return digest.hexdigest()


def describe_weight(value: ir.Value) -> str:
    """Return the type and shape of an initializer."""
    tensor = value.const_value
    return "?" if tensor is None else f"{tensor.dtype} {list(graph.dims_of(tensor))}"


def weight_digest(value: ir.Value) -> bytes:
    """Return the SHA-256 of an initializer's elements; nothing where it has none."""
    tensor = value.const_value
    if tensor is None:
        return b""
    if tensor.dtype == ir.DataType.STRING:  # length first: ("a", "bc") is not ("ab", "c")
        texts = [text if isinstance(text, bytes) else str(text).encode() for text in tensor.numpy().reshape(-1)]
        return hashlib.sha256(b"".join(b"%d:%b" % (len(text), text) for text in texts)).digest()
    return hashlib.sha256(tensor.tobytes()).digest()
