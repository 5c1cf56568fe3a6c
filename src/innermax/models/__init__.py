"""Models: networks by name, model files, other people's models, export."""
