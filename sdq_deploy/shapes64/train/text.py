"""The tokenizer, whose BPE makes one token of each word of the vocabulary, and the untrained text encoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdq_deploy.shapes64.captions import VOCABULARY

__all__ = ["MAX_LENGTH", "TEXT_WIDTH", "build_text_encoder", "build_tokenizer", "save_tokenizer"]

MAX_LENGTH = 32  # tokens, start and end included; the longest caption has 24
TEXT_WIDTH = 128

_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer over bytes, with the merges that the vocabulary needs."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(VOCABULARY)
    # CLIP's order: bytes, bytes that end a word, merges, special tokens. With all bytes there, nothing is unknown.
    symbols = [*alphabet, *(byte + _WORD_END for byte in alphabet), *(a + b for a, b in merges), _START, _END]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until each word is one symbol, the commonest pair first and ties by name.

    `tokenizers`' own trainer breaks ties by a hash that changes with the process, so the processes of one training,
    or a run and its resumption, would disagree about the ids of words.
    """
    spelled = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    merges = []
    while any(len(word) > 1 for word in spelled):
        counts = Counter(pair for word in spelled for pair in pairwise(word))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        spelled = [_merged(word, best) for word in spelled]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    symbols: list[str] = []
    for symbol in word:
        if symbols and (symbols[-1], symbol) == pair:
            symbols[-1] += symbol
        else:
            symbols.append(symbol)
    return symbols


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
