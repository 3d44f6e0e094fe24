"""Recipes, targets and the JSON schema, as package data."""
