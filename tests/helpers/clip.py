"""A tiny CLIP with random weights, and a tokenizer that knows a few words."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

WORDS = ("<pad>", "<unk>", "<start>", "a", "photo", "of", "bird", "boat", "red", "blue", "<end>")
#: Rows and columns of its images.
SIDE = 32


def clip() -> CLIPModel:
    config = CLIPConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": len(WORDS),
            "max_position_embeddings": 10,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": len(WORDS) - 1,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": 8,
        },
        projection_dim=12,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config).eval()
        for weight in model.parameters():  # so large that attention is not the same everywhere
            torch.nn.init.normal_(weight, std=0.3)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", len(WORDS) - 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        model_input_names=["input_ids", "attention_mask"],
    )


def folder(root: Path) -> Path:
    """Write the model, its tokenizer and its image processor, as `save_pretrained` does."""
    clip().save_pretrained(root)
    tokenizer().save_pretrained(root)
    CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.2, 0.3, 0.4],
    ).save_pretrained(root)
    return root
