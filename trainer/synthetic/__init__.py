"""The small world: scenes of drawn objects whose every edit has a known ground truth."""
