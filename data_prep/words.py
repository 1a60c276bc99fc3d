"""Texts -> words that can be compared: the one normalisation of decontamination and of BM25."""

import re
import unicodedata

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; each Chinese, Japanese or Korean character is a word.

    Compatibility forms are one (NFKC): ligatures, full-width letters, composed and decomposed accents.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.casefold())
