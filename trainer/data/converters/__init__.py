"""Converters of published datasets; `trainer.data.convert` runs them."""
