"""What the paper reports for MIGE (tables 1 to 3), beside which our numbers stand.

Which encoders it used is not known to the last detail: compare with that in mind. Of MagicBrush it is not known which
turns its numbers are of; the benchmark's own tables begin with single turns.
"""

from collections.abc import Mapping

PaperRows = Mapping[str, Mapping[str, float]]  # a row's name, and its metrics

PAPER: Mapping[str, tuple[int, PaperRows]] = {  # by layout: the table's number, and its rows
    "dreambench": (1, {"all prompts": {"DINO": 0.744, "CLIP-I": 0.830, "CLIP-T": 0.293}}),
    "emu-edit": (
        2,
        {
            "all tasks": {
                "DINO": 0.832,
                "CLIP-I": 0.865,
                "CLIP-T": 0.306,
                "CLIP-dir": 0.114,
                "L1": 0.088,
                "L2": 0.027,
            }
        },
    ),
    "magicbrush": (
        2,
        {
            "turns not stated": {
                "DINO": 0.889,
                "CLIP-I": 0.905,
                "CLIP-T": 0.306,
                "CLIP-dir": 0.119,
                "L1": 0.055,
                "L2": 0.013,
            }
        },
    ),
    "migebench": (
        3,
        {
            "addition": {
                "DINO": 0.909,
                "CLIP-I": 0.940,
                "CLIP-T": 0.322,
                "subject DINO": 0.638,
                "subject CLIP-I": 0.838,
            },
            "replacement": {
                "DINO": 0.863,
                "CLIP-I": 0.909,
                "CLIP-T": 0.307,
                "subject DINO": 0.652,
                "subject CLIP-I": 0.834,
            },
        },
    ),
}
