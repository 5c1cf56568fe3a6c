"""Attacks: searches for the highest loss over a threat model."""
