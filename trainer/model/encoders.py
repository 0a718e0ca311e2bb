"""MIGE's multimodal encoder (paper, section 3.2): images to tokens, and text and image tokens to one sequence.

Shapes: N reference images, Q query tokens of an image, D text width, B prompts, L tokens of a prompt, T patches,
p x p pixels of the ViT's input, c latent channels, rh x rw latents of a reference image.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    T5Config,
    T5EncoderModel,
)

from mige_rt.config import ModelConfig
from trainer.model.dit import PatchEmbedder


class FeatureFusion(nn.Module):
    """Adds the VAE's visual features to the Q-Former's semantic ones by cross-attention (paper, section 3.2)."""

    def __init__(self, width: int, visual_width: int, heads: int) -> None:
        super().__init__()
        self.q_proj_1 = nn.Linear(width, width, bias=False)
        self.k_proj_1 = nn.Sequential(nn.Linear(visual_width, width), nn.GELU(), nn.Linear(width, width))
        self.v_proj_1 = nn.Sequential(nn.Linear(visual_width, width), nn.GELU(), nn.Linear(width, width))
        self.ln_q_1 = nn.LayerNorm(width, eps=1e-6)
        self.ln_k_1 = nn.LayerNorm(width, eps=1e-6)
        self.ln_v_1 = nn.LayerNorm(width, eps=1e-6)
        self.clip_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Linear(width, width)
        self.ln_out = nn.LayerNorm(width, eps=1e-6)
        nn.init.zeros_(self.mlp.weight)  # training starts from the semantic features alone
        nn.init.zeros_(self.mlp.bias)

    def forward(self, semantic: Tensor, visual: Tensor) -> Tensor:
        """Fuse semantic features [N,Q,width] with visual ones [N,T,visual_width]; [N,Q,width]."""
        q = self.ln_q_1(self.q_proj_1(semantic))
        k = self.ln_k_1(self.k_proj_1(visual))
        v = self.ln_v_1(self.v_proj_1(visual))
        attended, _ = self.clip_attn(q, k, v, need_weights=False)
        return self.ln_out(self.mlp(attended) + semantic)


class ImageEncoder(nn.Module):
    """The graph `image_encoder`: an image to the Q tokens that stand for it in the instruction."""

    def __init__(self, config: ModelConfig, patch_embedder: PatchEmbedder) -> None:
        """Build with random weights.

        Args:
            config: The model's sizes.
            patch_embedder: The denoiser's; the two modules share its weights.
        """
        super().__init__()
        vit, qformer = config.vision, config.qformer
        self.vision = Blip2VisionModel(
            Blip2VisionConfig(
                hidden_size=vit.width,
                intermediate_size=vit.mlp,
                num_hidden_layers=vit.depth,
                num_attention_heads=vit.heads,
                image_size=vit.side,
                patch_size=vit.patch,
                layer_norm_eps=1e-6,
                initializer_range=0.02,  # the library's own, 1e-10, cannot be trained from
                attn_implementation="eager",  # pyright: ignore[reportCallIssue]
            )
        )
        self.vision.post_layernorm.eps = 1e-5  # BLIP-2's ln_vision, unlike the norms inside the ViT
        self.query_tokens = nn.Parameter(torch.randn(1, qformer.queries, qformer.width) * 0.02)
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=qformer.width,
                num_hidden_layers=qformer.depth,
                num_attention_heads=qformer.heads,
                intermediate_size=qformer.mlp,
                encoder_hidden_size=vit.width,
                cross_attention_frequency=2,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                attn_implementation="eager",  # pyright: ignore[reportCallIssue]
            )
        )
        self.patch_embedder = patch_embedder
        self.fusion = FeatureFusion(qformer.width, config.dit.width, qformer.fusion_heads)
        self.projection = nn.Linear(qformer.width, config.text.width)

    def freeze_vit(self) -> None:
        """Train all but the ViT, whose features training computes once (paper, section 4.1)."""
        self.vision.embeddings.requires_grad_(False)
        self.vision.encoder.requires_grad_(False)

    def vit(self, pixels_vit: Tensor) -> Tensor:
        """The frozen ViT's features before ln_vision, [N,1+patches,ViT width], of pixels_vit [N,3,p,p]."""
        dtype = self.vision.embeddings.patch_embedding.weight.dtype
        return self.vision.encoder(inputs_embeds=self.vision.embeddings(pixels_vit.to(dtype))).last_hidden_state

    def visual_features(self, ref_latents: Tensor) -> Tensor:
        """The patch embedder's features, [N,T,DiT width], of unscaled ref_latents [N,c,rh,rw]; its source is zero."""
        latents = ref_latents.to(self.patch_embedder.proj.weight.dtype)
        return self.patch_embedder(F.pad(latents, (0, 0, 0, 0, 0, latents.shape[1])))

    def query(self, vision: Tensor) -> Tensor:
        """The Q-Former's output, [N,Q,Q-Former width], of ViT features after ln_vision, [N,1+patches,ViT width]."""
        queries = self.query_tokens.expand(vision.shape[0], -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=vision).last_hidden_state

    def tokens(self, vit_features: Tensor, ref_latents: Tensor) -> Tensor:
        """Like `forward`, from the features that `vit` gives, which training computes once."""
        semantic = self.query(self.vision.post_layernorm(vit_features))
        return self.projection(self.fusion(semantic, self.visual_features(ref_latents)))

    def forward(self, pixels_vit: Tensor, ref_latents: Tensor) -> Tensor:
        """Encode reference images.

        Args:
            pixels_vit: Normalized for the ViT, float32 [N,3,p,p].
            ref_latents: The VAE's, unscaled, float32 [N,c,rh,rw].

        Returns:
            image_tokens [N,Q,D].
        """
        return self.tokens(self.vit(pixels_vit), ref_latents)


class TextEncoder(nn.Module):
    """The graph `text_encoder`: token embeddings, with image tokens in their slots, through T5's encoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text = config.text
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=text.vocabulary,
                d_model=text.width,
                d_kv=text.head_width,
                d_ff=text.mlp,
                num_layers=text.depth,
                num_heads=text.heads,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                attn_implementation="eager",  # pyright: ignore[reportCallIssue]
            )
        )

    def mix(self, token_ids: Tensor, image_tokens: Tensor, slot_index: Tensor) -> Tensor:
        """The sequence that enters T5, [B,L,D]; the arguments are those of `forward`."""
        text = self.t5.get_input_embeddings()(token_ids)  # [B,L,D]
        slots = image_tokens.reshape(-1, image_tokens.shape[-1]).to(text.dtype)  # [N*Q,D]
        return torch.where(slot_index[..., None] >= 0, slots[slot_index.clamp(min=0)], text)

    def forward(self, token_ids: Tensor, image_tokens: Tensor, slot_index: Tensor, text_mask: Tensor) -> Tensor:
        """Encode prompts.

        Args:
            token_ids: int64 [B,L].
            image_tokens: [N,Q,D]; a batch without any image passes the tokens of one dummy image.
            slot_index: int64 [B,L]: -1 for text, otherwise an index into the N*Q image tokens.
            text_mask: bool [B,L], true where there is a token.

        Returns:
            text_states [B,L,D].
        """
        mixed = self.mix(token_ids, image_tokens, slot_index)
        # T5's sums between layers take the type of its `wo`, which stays float32 where the rest is float16.
        wo: Any = self.t5.get_submodule("encoder.block.0.layer.1.DenseReluDense.wo")  # perhaps with a LoRA around it
        mixed = mixed.to(wo.weight.dtype)
        return self.t5(inputs_embeds=mixed, attention_mask=text_mask).last_hidden_state
