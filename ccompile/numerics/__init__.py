"""Arrays in, arrays and errors out; imports nothing of ccompile."""
