"""The stages that make a model, in the order of `trainer.__main__`."""
