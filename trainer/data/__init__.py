"""Training data from files: manifests, converters of published datasets, features computed once, mixing."""
