"""MIGE assembled: the six modules by the names of their graphs."""

from torch import nn

from mige_rt.config import ModelConfig
from mige_rt.graphs import GraphName
from trainer.model.dit import Conditioner, Denoiser
from trainer.model.encoders import ImageEncoder, TextEncoder
from trainer.model.vae import VAEDecoder, VAEEncoder, make_vae


class Mige(nn.Module):
    """The six modules, named as in engines.interface.GRAPHS. Weights are random until a checkpoint is loaded."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        vae = make_vae(config.vae)
        self.vae_encoder = VAEEncoder(vae)
        self.vae_decoder = VAEDecoder(vae)
        self.denoiser = Denoiser(config)
        self.conditioner = Conditioner(config)
        self.image_encoder = ImageEncoder(config, self.denoiser.x_embedder)
        self.text_encoder = TextEncoder(config)

    def graph(self, name: GraphName) -> nn.Module:
        """The module that computes the graph `name`."""
        return self.get_submodule(name)

    def set_graph(self, name: GraphName, module: nn.Module) -> None:
        """Put `module` in the place of the graph `name`; what it shares with other graphs is shared no longer."""
        self.set_submodule(name, module, strict=True)
