"""What the last stage trains, as one module."""

from copy import copy

from torch import Tensor, nn

from trainer.checkpoints.model_folder import COMPONENTS
from trainer.data.batches import TrainingBatch
from trainer.model.mige import Mige
from trainer.stages.features import Batch


class TrainedPart(nn.Module):
    """All but the VAE, with the frozen ViT beside the rest: a prediction from a batch of features."""

    def __init__(self, model: Mige) -> None:
        super().__init__()
        self.config = model.config
        self.image_encoder, self.text_encoder = model.image_encoder, model.text_encoder
        self.conditioner, self.denoiser = model.conditioner, model.denoiser
        self.image_encoder.freeze_vit()

    def with_vae(self, other: Mige) -> Mige:
        """A whole model that shares this part's weights and another's VAE."""
        whole = copy(other)
        whole._modules = {**other._modules, **{name: self._modules[name] for name in COMPONENTS}}
        return whole

    def text_states(self, batch: Batch | TrainingBatch) -> Tensor:
        """T5's output for a batch, [B,L,D]."""
        image_tokens = self.image_encoder.tokens(batch.vit, batch.ref_latents)
        return self.text_encoder(batch.token_ids, image_tokens, batch.slot_index, batch.text_mask)

    def forward(
        self, batch: Batch | TrainingBatch, noisy: Tensor, source: Tensor, timestep: Tensor, has_text: Tensor
    ) -> Tensor:
        """The denoiser's output for K draws of noise of each sample, draw by draw, which share one encoding.

        Args:
            batch: B samples.
            noisy: Latents with noise, [K*B,c,h,w].
            source: The sources' latents, [K*B,c,h,w].
            timestep: int64 [K*B].
            has_text: bool [K*B].

        Returns:
            [K*B,c or 2c,h,w]
        """
        draws = len(noisy) // len(batch.target)
        states, mask = self.text_states(batch).repeat(draws, 1, 1), batch.text_mask.repeat(draws, 1)
        cross_kv = self.conditioner(states, has_text)
        return self.denoiser.predict(noisy, source, timestep.float(), cross_kv, mask)
