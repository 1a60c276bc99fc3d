"""Texts -> words that can be compared: the one normalisation of decontamination and of BM25."""

import re
import unicodedata

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_THAI_LAO_BURMESE_KHMER = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_UNSPACED = f"{_CJK}{_THAI_LAO_BURMESE_KHMER}"
# Vowel signs and accents: no letters for `re`, yet parts of words. Of the basic plane alone, whose sets are fast.
_MARKS = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c) in ("Mn", "Mc"))
_ASCII_WORD = re.compile(r"\w+")
_WORD = re.compile(rf"[{_UNSPACED}][{_MARKS}]*|[^\W{_UNSPACED}]+(?:[{_MARKS}]+[^\W{_UNSPACED}]*)*")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; each character of a script that is written without spaces is a word.

    These are Chinese, Japanese and Korean, and Thai, Lao, Burmese and Khmer with the marks on a character.

    Compatibility forms are one (NFKC): ligatures, full-width letters, composed and decomposed accents.
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
