"""How good a model's pictures are, measured on samples of the small world."""
