"""`mige-rt eval`: the public benchmarks of the paper, from generating to the tables, and a blind user study.

Two steps, each of which goes on where it was stopped: `generate` writes a benchmark's images into a results folder,
`judge` measures them. `trainer.evaluate` is another thing: the default model's own evaluation while it is trained.
"""
