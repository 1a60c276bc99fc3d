"""Texts -> comparable words: the normalisation that decontamination and BM25 share."""

import re
import unicodedata

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_THAI_LAO_BURMESE_KHMER = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_UNSPACED = f"{_CJK}{_THAI_LAO_BURMESE_KHMER}"
# Vowel signs and accents: not letters to `re`, yet parts of words. Only the basic plane, because its sets are fast.
_MARKS = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c) in ("Mn", "Mc"))
_ASCII_WORD = re.compile(r"\w+")
_WORD = re.compile(rf"[{_UNSPACED}][{_MARKS}]*|[^\W{_UNSPACED}]+(?:[{_MARKS}]+[^\W{_UNSPACED}]*)*")


def words(text: str) -> list[str]:
    """Split a text into lower-case words without punctuation.

    In scripts treated as unspaced, each character with its marks is a word: Chinese, Japanese, Korean, Thai, Lao,
    Burmese and Khmer.

    NFKC makes compatibility forms equal: ligatures, full-width letters, composed and decomposed accents.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
