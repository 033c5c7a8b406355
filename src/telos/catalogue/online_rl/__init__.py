"""Recipes of online control."""
