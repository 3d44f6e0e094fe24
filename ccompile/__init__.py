"""ccompile: compiles neural networks in ONNX to smaller and faster ones under a declarative, verified spec."""

__version__ = "0.1.0"
