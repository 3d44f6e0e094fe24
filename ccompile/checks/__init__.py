"""A compiled model today against the evidence of its compile."""
