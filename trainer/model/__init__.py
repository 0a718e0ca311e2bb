"""MIGE's six modules, each with the inputs and outputs of the graph of the same name (mige_rt.graphs)."""
