"""The real classes of transformers, at tiny sizes with random weights, saved as their models are."""

from pathlib import Path

import torch


def save_tokenizer(folder: Path, special: tuple[str, ...], template: str) -> None:
    """Words as tokens. special: padding, unknown, first, last."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Punctuation, Sequence, Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = [*special, "a", "car", "at", "night", "dog", "in", "the", "jungle", "signboard", "."]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, special[1]))
    tokenizer.pre_tokenizer = Sequence([Whitespace(), Punctuation()])
    first, last = special[2], special[3]
    tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(first, vocabulary[first]), (last, vocabulary[last])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], unk_token=special[1], cls_token=first, sep_token=last
    ).save_pretrained(folder)


def save_clip(folder: Path) -> None:
    """CLIP, with vectors of 8 numbers."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": 32, "max_position_embeddings": 12, "eos_token_id": 3, "bos_token_id": 2}
    config = CLIPConfig(
        text_config={**text, "pad_token_id": 0},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    save_tokenizer(folder, ("<pad>", "<unk>", "<bos>", "<eos>"), "<bos> $A <eos>")


def save_detector(folder: Path) -> None:
    """Grounding DINO."""
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, GroundingDinoImageProcessorPil

    config = GroundingDinoConfig(
        backbone_config={
            "model_type": "swin",
            "embed_dim": 8,
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "window_size": 2,
            "image_size": 64,
            "out_features": ["stage2", "stage3", "stage4"],
        },
        text_config={
            "model_type": "bert",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "vocab_size": 32,
        },
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        max_text_len=16,
        disable_custom_kernels=True,
    )
    torch.manual_seed(2)
    GroundingDinoForObjectDetection(config).save_pretrained(folder)
    GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(folder)
    save_tokenizer(folder, ("[PAD]", "[UNK]", "[CLS]", "[SEP]"), "[CLS] $A [SEP]")


def save_segmenter(folder: Path) -> None:
    """SAM."""
    from transformers import SamConfig, SamImageProcessorPil, SamModel

    vision = {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {
        "num_pos_feats": 8,
        "image_size": 64,
        "patch_size": 16,
        "mlp_dim": 16,
        "window_size": 2,
        "global_attn_indexes": [0],
    }
    prompt = {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder |= {"iou_head_hidden_dim": 16}
    torch.manual_seed(3)
    config = SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    SamModel(config).save_pretrained(folder)
    SamImageProcessorPil(
        size={"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    ).save_pretrained(folder)
