"""How good a model's images are, measured on synthetic samples of concepts held out from training."""
