"""Data: image sets, readers, decoding, augmentation, streams."""
