"""Toy networks, fixtures and checks that tests share."""
