"""Adapters as people have them on disk: their names, their formulas, and what of a model they change."""
