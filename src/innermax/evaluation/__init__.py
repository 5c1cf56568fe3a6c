"""Evaluation: who is right under which attack, whether that can be believed, and what transfers."""
