"""`mige-rt annotate`: people make a benchmark of editing pairs (the paper's section F).

A page walks the pairs of a manifest. Each decision is a line of a file that is only ever added to; benchmarks are
exported from those files, in the layout of MIGEBench.
"""
