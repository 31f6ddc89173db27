"""Small tokenizers of the kinds that checkpoints have, besides the byte-level BPE of the synthetic ones."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_LETTERS = list("abcdefghijklmnopqrstuvwxyz<>|_/é")
_WORDS = ["▁a", "▁an", "th", "the", "▁the", "in", "▁in"]
_MERGES = [("▁", "a"), ("▁a", "n"), ("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("▁", "in")]


def sentencepiece(*, metaspace: bool = False) -> Tokenizer:
    """Return a BPE like LLaMA's, with bytes for unknown characters. ``metaspace``: as newer checkpoints have it."""
    pieces = ["<unk>", "<s>", "</s>", *_BYTES, "▁", *_LETTERS, *_WORDS]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, _MERGES, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in ("<unk>", "<s>", "</s>", "<image>")])
    return tokenizer
