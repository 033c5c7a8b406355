"""Language models, their heads and their generation engines."""
