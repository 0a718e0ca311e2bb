"""From a checkpoint to a bundle: ONNX graphs, their validation against PyTorch, and engines built from them."""
