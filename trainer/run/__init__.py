"""Training at the paper's scale: `mige-rt train`, on one process or many."""
