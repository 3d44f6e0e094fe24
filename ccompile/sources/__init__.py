"""Where samples come from: what a spec says about a source, and one module per kind that opens it as a stream."""
