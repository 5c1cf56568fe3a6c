"""Files, validation, randomness, intervals, serialization."""
