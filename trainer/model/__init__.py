"""MIGE's six modules, each with exactly the inputs and outputs of the graph of the same name."""
