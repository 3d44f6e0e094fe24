"""One file, one pass. `ccompile passes` lists them; README.md here is generated from their declarations."""
