"""What an audit may have measured."""

from dataclasses import replace

from innermax.evaluation.audit import Evidence, Quantiles, SearchEvidence

KNOWN = Quantiles(0.0, 0.0, 0.0)


def search(**changed):
    return replace(SearchEvidence(KNOWN, KNOWN, 0.0, 0.0, steps=20, reach=5.0, late_gain=0.0, loss_gain=0.1), **changed)


def evidence(**changed):
    searches = {"pgd": changed.pop("search", search())}
    base = Evidence(100, 50, 25, searches, "pgd", False, 0.0, False, 0.0, 0.0, 1.0, 1.0)
    return replace(base, **changed)
