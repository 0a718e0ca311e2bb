"""Converters of published datasets; `trainer.data.convert` runs them."""

LAYOUTS = (
    "instructpix2pix",
    "magicbrush",
    "ultraedit",
    "seed-data-edit",
    "hq-edit",
    "gier",
    "subjects200k",
)
