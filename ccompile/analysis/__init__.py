"""Pure functions from a model to frozen facts."""
