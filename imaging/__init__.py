"""Image decoding and view geometry, shared by both stages: pillow and numpy, no torch."""
