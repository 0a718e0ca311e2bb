"""MIGE in PyTorch: the model, checkpoints, synthetic data, training and evaluation."""
