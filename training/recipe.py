"""The shape of the demo model: sizes, special tokens and image bounds."""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen3VLConfig

CHECKPOINT = Path(__file__).resolve().parent.parent / "src" / "chiasm" / "checkpoints" / "demo"

VOCABULARY = 640
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
ID = {token: VOCABULARY - len(SPECIAL_TOKENS) + i for i, token in enumerate(SPECIAL_TOKENS)}
"""Token ids of the special tokens, the last of the vocabulary, as in Qwen's own tokenizers."""

MIN_PIXELS, MAX_PIXELS = 96 * 96, 128 * 160
"""Bounds of an image's area after the image processor: 9 to 20 image tokens."""


def model_config() -> Qwen3VLConfig:
    """Return the configuration of the 3.9-million-parameter model."""
    return Qwen3VLConfig(
        architectures=["Qwen3VLForConditionalGeneration"],
        tie_word_embeddings=True,
        image_token_id=ID["<|image_pad|>"],
        video_token_id=ID["<|video_pad|>"],
        vision_start_token_id=ID["<|vision_start|>"],
        vision_end_token_id=ID["<|vision_end|>"],
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "num_heads": 2,
            "intermediate_size": 384,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 192,
            "num_position_embeddings": 144,
            "deepstack_visual_indexes": [0, 1],
        },
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [12, 10, 10],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": True,
            "bos_token_id": ID["<|endoftext|>"],
            "eos_token_id": ID["<|im_end|>"],
            "pad_token_id": ID["<|endoftext|>"],
        },
    )
