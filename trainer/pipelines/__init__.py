"""The paper's four data pipelines: raw images and texts to samples of multimodal instructions (MIGE, appendix C)."""
