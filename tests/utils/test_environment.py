"""What a run ran on is told wherever it runs: also from the source, with Lightning Fabric in another package."""

import importlib.metadata

import pytest

import innermax
from innermax.utils.environment import environment


@pytest.mark.parametrize("fabric", ["lightning-fabric", "pytorch-lightning", "lightning", None])
def test_versions_without_an_installation(monkeypatch, fabric):
    known = {"numpy": "2.1", fabric: "2.6"}

    def version(name):
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    versions = environment(3)["versions"]
    expected = {"innermax": innermax.__version__, "numpy": "2.1", "lightning-fabric": fabric and "2.6"}
    assert {name: versions[name] for name in expected} == expected
