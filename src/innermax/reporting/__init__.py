"""The robustness report: what an evaluation and a training found, as one page for people to look at."""
