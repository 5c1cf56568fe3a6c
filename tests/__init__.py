"""Tests mirror the folders of src/innermax; what several share is in helpers."""

from tests.helpers import typechecker as typechecker  # jaxtyping's hook imports this package and no deeper
