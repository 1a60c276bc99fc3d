"""Invariants: only public docstrings, in order; a summary is a sentence, a body is prose; the rest is left out."""

import pytest
from conftest import WORDS

from data_prep.documentation.docstrings import clean_body, docstrings_of, split_docstring

PROSE = " ".join(f"word{i}" if i % 7 == 0 else WORDS[i % len(WORDS)] for i in range(30))


def test_only_public_docstrings_are_taken_and_in_order() -> None:
    doc = f'"""Say what this one does.\n\n    {PROSE}\n    """'
    source = f"""
def one(): {doc}
def _hidden(): {doc}
class Two:
    {doc}
    def three(self): {doc}
    def __len__(self): {doc}
    async def four(self):
        {doc}
        def inner(): {doc}
class _Private:
    def five(self): {doc}
def silent(): pass
"""
    found = docstrings_of(source.encode(), "pkg/m.py")
    assert [(d.scope, d.name) for d in found] == [("", "one"), ("", "Two"), ("Two", "Two.three"), ("Two", "Two.four")]
    assert {(d.summary, d.body, d.module) for d in found} == {("Say what this one does.", PROSE, "pkg/m.py")}


@pytest.mark.parametrize(
    "docstring",
    [
        f"Too short here.\n\n{PROSE}",
        f"{'long ' * 50}\n\n{PROSE}",
        "A summary without any body.",
        "A summary with a short body.\n\nOnly a few words here.",
        f"Deprecated since version 1, use other.\n\n{PROSE}",
        f"Alias for the other function.\n\n{PROSE}",
        f"1.0 2.0 3.0 4.0 5.0\n\n{PROSE}",
        f"Fill in the %(name)s of this.\n\n{PROSE}",
        f"Fill in the {{klass}} of this.\n\n{PROSE}",
        "A summary with only pointers.\n\nSee Also\n--------\n" + PROSE,
        "A summary with only examples.\n\nExamples:\n    " + PROSE,
        "A summary with only code.\n\n>>> " + PROSE,
    ],
)
def test_unusable_docstrings_are_left_out(docstring: str) -> None:
    assert split_docstring(docstring) is None
    assert split_docstring(f"A summary that will do.\n\n{PROSE}") == ("A summary that will do.", PROSE)


def test_markup_and_pointers_are_left_out_of_a_body() -> None:
    body = clean_body(
        """\
        Uses :func:`~numpy.dot` and ``x**2`` as in [1]_, **always** with **kwargs.

        .. math::

            a + b

        .. versionadded:: 1.2

        Parameters
        ----------
        x : int
            A number, see :ref:`the guide <guide>`.

        See Also
        --------
        other : a thing

        Notes
        -----
        Some code::

            y = f(x)

        is called.

        >>> f(1)
        2

        Read more in the :ref:`User Guide <x>`.

        References
        ----------
        .. [1] Somebody
        """
    )
    assert body == (
        "Uses numpy.dot and `x**2` as in, always with **kwargs.\n\n"
        "Parameters\nx : int\n    A number, see the guide.\n\n"
        "Notes\nSome code:\n\nis called."
    )


def test_a_long_body_is_cut_between_words() -> None:
    body = clean_body(" ".join(WORDS * 20))
    assert 1150 < len(body) <= 1200
    assert body.split()[-1] in WORDS
