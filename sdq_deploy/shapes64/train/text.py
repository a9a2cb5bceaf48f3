"""The tokenizer, whose BPE makes one token of each word of the vocabulary, and the untrained text encoder."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdq_deploy.shapes64.captions import VOCABULARY

__all__ = ["MAX_LENGTH", "TEXT_WIDTH", "build_text_encoder", "build_tokenizer", "save_tokenizer"]

MAX_LENGTH = 32  # tokens, start and end included; the longest caption has 24
TEXT_WIDTH = 128

_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer over bytes, with the merges that the vocabulary needs."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, initial_alphabet=alphabet, end_of_word_suffix=_WORD_END, show_progress=False
    )
    bpe.train_from_iterator(VOCABULARY, trainer)
    merges = [tuple(pair) for pair in _merges_of(bpe)]
    # CLIP's order: bytes, bytes that end a word, merges, special tokens. With all bytes there, nothing is unknown.
    symbols = [*alphabet, *(byte + _WORD_END for byte in alphabet), *(a + b for a, b in merges), _START, _END]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def _merges_of(bpe: Tokenizer) -> list[list[str]]:
    import json

    merges: list[list[str]] = json.loads(bpe.to_str())["model"]["merges"]
    return merges


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """tokenizer.json and its configuration, with vocab.json and merges.txt beside them as CLIP has."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Three causal transformer layers of width 128; random weights."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
