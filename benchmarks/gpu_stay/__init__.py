"""One stay on a GPU: everything that only a card can settle, in one command, see `benchmarks.gpu_stay.__main__`."""
