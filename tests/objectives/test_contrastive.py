"""Invariants: InfoNCE equals its definition, whatever the chunks; the pool and its order do not depend on the ranks;
known false negatives are masked by text identity, and only they; margin, further similarities, the softmax per side
and Matryoshka dimensions equal loops over single cosines."""

import math

import numpy as np
import pytest
import torch
from reference import naive_contrastive, relative
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.utils._python_dispatch import TorchDispatchMode

from anchor.config.objectives import ContrastiveTermSection
from anchor.data.shards import Pack, make_batch
from anchor.errors import ConfigError
from anchor.objectives.contrastive import ContrastiveTerm
from anchor.objectives.info_nce import info_nce
from anchor.objectives.pool import KnownMatches, OwnTexts, _partners, pool_layout


def test_info_nce_equals_a_hand_computed_case():
    cosine = torch.tensor([[1.0, 0.0, -1.0]])
    loss = info_nce(cosine, torch.tensor([0]), torch.ones(1, 3, dtype=torch.bool), temperature=0.5)
    expected = -math.log(math.exp(2) / (math.exp(2) + math.exp(0) + math.exp(-2)))
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_info_nce_leaves_out_masked_documents():
    cosine = torch.tensor([[1.0, 0.9, -1.0]])
    keep = torch.tensor([[True, False, True]])
    loss = info_nce(cosine, torch.tensor([0]), keep, temperature=0.5)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(-4)), rel=1e-5)


def test_info_nce_refuses_a_temperature_that_is_not_positive():
    ones = torch.ones(1, 1)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        info_nce(ones, torch.tensor([0]), ones.bool(), temperature=0.0)


def make_pack(texts: list[tuple[int, ...]]) -> Pack:
    """Return a pack of pairs whose segments have one token; the numbers are text identities."""
    flat = np.asarray([text for pair in texts for text in pair], dtype=np.int64)
    ones = np.ones(len(flat), dtype=np.int32)
    roles = np.concatenate([np.arange(len(pair)) for pair in texts]).astype(np.int8)
    return Pack(ones, ones, 0 * ones, ones, roles, flat, flat)


PACKS = [
    make_pack([(1, 11, 21)]),
    make_pack([(2, 12, 22), (3, 13, 23)]),
    make_pack([(4, 14, 24)]),
    make_pack([(5, 15, 25)]),
]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_query_finds_its_positive_in_the_pool_of_all_ranks(world_size):
    batch = make_batch(PACKS, "x")
    pool = [t for pack in PACKS for t, role in zip(pack.text_ids, pack.roles, strict=True) if role > 0]
    found = []
    for rank in range(world_size):
        layout = pool_layout(batch, rank, world_size)
        assert sum(layout.documents_per_rank) == len(pool)
        assert len(layout.local_documents) == layout.documents_per_rank[rank]
        assert layout.num_queries == 5
        found += [pool[t] for t in layout.local_target]
    assert found == [11, 12, 13, 14, 15]


def kept(pairs: list[tuple[int, ...]], similarity="query_to_document") -> list[list[bool]]:
    layout = pool_layout(make_batch([make_pack(pairs)], "x"), 0, 1)
    keep = KnownMatches(layout, torch.device("cpu"), (similarity,)).keep(similarity, slice(0, len(pairs)))
    if similarity == "query_to_document":
        rows = torch.arange(len(pairs))
        assert not keep[rows, torch.from_numpy(layout.target)].any()  # the positive is put back by the loss
        keep[rows, torch.from_numpy(layout.target)] = True
    return keep.tolist()


def test_a_positive_that_occurs_twice_is_no_negative_of_the_other_query():
    assert kept([(1, 11), (2, 11), (3, 13)]) == [[True, False, True], [False, True, True], [True, True, True]]


def test_positives_of_the_same_query_are_no_negatives_of_one_another():
    assert kept([(1, 11), (1, 12), (3, 13)]) == [[True, False, True], [False, True, True], [True, True, True]]


def test_a_document_equal_to_the_query_is_no_negative():
    assert kept([(1, 11), (2, 1)]) == [[True, False], [True, True]]


def test_every_copy_of_a_known_positive_is_masked_and_other_hard_negatives_stay():
    pool_of_two = kept([(1, 11, 11), (1, 12, 22)])  # the pool is 11, 11, 12, 22
    assert pool_of_two == [[True, False, False, True], [False, False, True, True]]


def test_queries_of_the_same_document_are_no_negatives_of_it():
    pairs = [(1, 11), (2, 11), (3, 13)]
    expected = [[False, False, True], [False, False, True], [True, True, False]]
    assert kept(pairs, "document_to_query") == expected
    # Both answered by one document: neither is the other's negative.
    assert kept(pairs, "query_to_query") == expected


def test_positives_of_the_same_query_are_not_pushed_apart():
    pairs = [(1, 11), (1, 12), (3, 13)]
    expected = [[False, False, True], [False, False, True], [True, True, False]]
    assert kept(pairs, "document_to_document") == expected
    assert kept(pairs, "query_to_query") == expected
    assert kept(pairs, "document_to_query") == expected


def test_without_masks_every_text_but_the_own_is_a_negative():
    """Copies of the own text are negatives too, as in the paper's released code and in sentence-transformers."""
    pairs = [(1, 11, 11), (1, 12, 1), (2, 11, 8)]
    layout = pool_layout(make_batch([make_pack(pairs)], "x"), 0, 1)
    own = OwnTexts(layout, torch.device("cpu"))
    assert own.keep("query_to_document", slice(0, 3)).logical_not().nonzero().tolist() == [[0, 0], [1, 2], [2, 4]]
    for similarity in ("query_to_query", "document_to_query"):
        assert own.keep(similarity, slice(1, 3)).logical_not().nonzero().tolist() == [[0, 1], [1, 2]]
    assert torch.equal(own.keep("document_to_document", slice(0, 3)), own.keep("query_to_document", slice(0, 3)))


def test_masks_of_a_run_of_rows_equal_those_of_all():
    layout = pool_layout(make_batch([make_pack([(1, 11, 9), (1, 12, 3), (2, 11, 8), (3, 13, 7)])], "x"), 0, 1)
    known = KnownMatches(layout, torch.device("cpu"), ALL)
    for similarity in ALL:
        whole = known.keep(similarity, slice(0, 4))
        # Masks do not depend on what others are asked for.
        alone = KnownMatches(layout, torch.device("cpu"), (similarity,))
        assert torch.equal(alone.keep(similarity, slice(0, 4)), whole)
        assert torch.equal(torch.cat([known.keep(similarity, slice(a, a + 1)) for a in range(4)]), whole)
        assert not whole.all()


def every_known_text(texts, partners, local: slice) -> dict[tuple[int, ...], set[int]]:
    """Map the local pairs of each text that several pairs have to its partners, text by text."""
    found = {}
    for text in set(texts.tolist()):
        pairs = np.flatnonzero(texts == text)
        rows = tuple(int(i) - local.start for i in pairs if local.start <= i < local.stop)
        if len(pairs) > 1 and rows:
            found[rows] = set(partners[pairs].tolist())
    return found


@pytest.mark.parametrize("kinds", [1, 5, 40, 10**6])
def test_only_texts_of_several_pairs_have_lists_and_those_are_whole(kinds):
    rng = np.random.default_rng(0)
    texts, partners = (rng.integers(-kinds, kinds, 90) for _ in range(2))
    for local in (slice(0, 90), slice(30, 60), slice(60, 60)):
        ours = _partners(texts, partners, local)
        assert {tuple(rows.tolist()): set(known.tolist()) for rows, known in ours} == every_known_text(
            texts, partners, local
        )
        assert all((np.diff(known) > 0).all() for _, known in ours)
    assert _partners(texts[:0], partners[:0], slice(0, 0)) == []
    assert bool(_partners(texts, partners, slice(0, 90))) == (kinds < 10**6)


ALL = ("query_to_document", "query_to_query", "document_to_query", "document_to_document")
OPTIONS = {
    "plain": {},
    "margin": {"false_negative_margin": 0.1},
    "margin below zero": {"false_negative_margin": -0.2},
    "GTE": {"negatives": ALL},
    "symmetric": {"negatives": ("query_to_document", "document_to_query"), "softmax": "per_side"},
    "per side, all": {"negatives": ALL, "softmax": "per_side", "false_negative_margin": 0.2},
    "same side only": {"negatives": ("query_to_document", "document_to_document")},
    "no masks": {"mask_known_matches": False},
    "no masks, all": {"mask_known_matches": False, "negatives": ALL, "softmax": "per_side"},
    "Matryoshka": {"matryoshka_dimensions": (2, 5)},
    "everything": {"negatives": ALL, "false_negative_margin": 0.3, "matryoshka_dimensions": (3,)},
}
REPEATS = make_pack([(1, 11, 21), (2, 12, 3), (3, 13, 23), (1, 14, 24), (5, 13, 11), (6, 16, 6), (7, 17, 27)])


def term_of(options: dict, chunk_rows: int | None = None) -> ContrastiveTerm:
    return ContrastiveTerm(ContrastiveTermSection(temperature=0.2, **options), 8, chunk_rows=chunk_rows)


def vectors() -> torch.Tensor:
    drawn = torch.randn(21, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=1).requires_grad_()


def value_and_gradient(loss_of) -> tuple[float, torch.Tensor]:
    leaf = vectors()
    loss = loss_of(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("chunk_rows", [None, 1, 3, 7])
def test_loss_and_gradient_equal_loops_over_single_cosines_whatever_the_chunks(options, chunk_rows):
    batch = make_batch([REPEATS], "x")
    term = term_of(options, chunk_rows)
    ours, gradient = value_and_gradient(lambda leaf: term.loss(leaf, batch, 0, 1)[0])
    expected, wanted = value_and_gradient(
        lambda leaf: naive_contrastive(leaf, REPEATS.roles, REPEATS.text_ids, term.section)
    )
    assert ours == pytest.approx(expected, rel=1e-12)
    assert relative(gradient, wanted) < 1e-12


@pytest.mark.parametrize("hard_negatives", [0, 2])
def test_loss_and_gradient_equal_those_of_sentence_transformers(hard_negatives):
    """Compare in float64, where only the equation matters: all texts differ, and each query has one positive."""
    pairs, columns = 6, 2 + hard_negatives
    batch = make_batch([make_pack([tuple(range(i * columns, (i + 1) * columns)) for i in range(pairs)])], "x")
    section = ContrastiveTermSection(temperature=0.05)
    theirs = MultipleNegativesRankingLoss(torch.nn.Identity(), scale=1 / 0.05)

    def rows() -> torch.Tensor:
        drawn = torch.randn(pairs, columns, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return torch.nn.functional.normalize(drawn, dim=-1).requires_grad_()

    ours, other = rows(), rows()
    loss = ContrastiveTerm(section, 8).loss(ours.flatten(0, 1), batch, 0, 1)[0]
    expected = theirs.compute_loss_from_embeddings(list(other.unbind(1)), torch.zeros(pairs))
    (gradient,), (wanted,) = torch.autograd.grad(loss, ours), torch.autograd.grad(expected, other)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-12) != 0
    # Theirs divides by the length of every vector; ours has taken it that they are of length one.
    radial = (wanted * other.detach()).sum(-1, keepdim=True) * other.detach()
    tangent = gradient - (gradient * ours.detach()).sum(-1, keepdim=True) * ours.detach()
    assert float(tangent.norm()) > 1e-3
    assert relative(tangent, wanted - radial) < 1e-12


class LargestTensor(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_tensor_of_rows_times_pool_is_ever_made(options):
    pairs, width = 64, 8
    pack = make_pack([(i, 1000 + i) for i in range(pairs)])
    rows = torch.nn.functional.normalize(torch.randn(2 * pairs, width), dim=1).requires_grad_()
    sizes = {}
    for chunk_rows in (None, 2):
        with LargestTensor() as largest:
            term_of(options, chunk_rows).loss(rows, make_batch([pack], "x"), 0, 1)[0].backward()
        sizes[chunk_rows] = largest.elements
    assert sizes[None] >= pairs * pairs
    # The embeddings themselves, or two rows of all four similarities, whichever is larger.
    assert sizes[2] <= max(2 * pairs * width, 2 * 4 * pairs)


def test_every_option_changes_the_loss():
    batch = make_batch([REPEATS], "x")
    values = {name: float(term_of(o).loss(vectors().detach(), batch, 0, 1)[0]) for name, o in OPTIONS.items()}
    assert len({round(value, 9) for value in values.values()}) == len(OPTIONS)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_metrics_do_not_depend_on_the_chunks(options):
    batch = make_batch([REPEATS], "x")
    _, whole = term_of(options).loss(vectors(), batch, 0, 1)
    _, cut = term_of(options, 2).loss(vectors(), batch, 0, 1)
    assert {"embedding/positive_cosine", "embedding/hardest_negative_cosine"} < set(whole)
    assert {n: float(v) for n, v in cut.items()} == pytest.approx({n: float(v) for n, v in whole.items()}, rel=1e-12)
    assert not any(value.requires_grad for value in whole.values())


def test_the_margin_leaves_out_what_is_closer_than_the_positive_and_says_how_many():
    """Query at angle 0, positive at cosine 0.6, negatives at 0.65, 0.75 and -1: margin 0.1 drops only the second."""
    batch = make_batch([make_pack([(1, 11, 21, 31, 41)])], "x")
    cosines = torch.tensor([1.0, 0.6, 0.65, 0.75, -1.0], dtype=torch.float64)
    rows = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    section = ContrastiveTermSection(temperature=0.5, false_negative_margin=0.1)
    loss, shares = ContrastiveTerm(section, 2).loss(rows, batch, 0, 1)
    assert float(loss) == pytest.approx(math.log(1 + math.exp(0.1) + math.exp(-3.2)), rel=1e-9)
    assert float(shares["embedding/over_margin_documents"]) == 1
    assert float(shares["embedding/hardest_negative_cosine"]) == pytest.approx(0.65)
    assert float(shares["embedding/retrieved_fraction"]) == 0


def test_all_similarities_in_one_softmax_equal_gte_by_hand():
    """Two pairs, no hard negatives: the positive once, and every other text against q_i and against d_i."""
    batch = make_batch([make_pack([(1, 11), (2, 12)])], "x")
    angles = torch.tensor([0.0, 0.3, 1.2, 1.9], dtype=torch.float64)  # q_1 d_1 q_2 d_2
    rows = torch.stack([angles.cos(), angles.sin()], dim=1)
    section = ContrastiveTermSection(temperature=0.5, negatives=ALL)
    loss, _ = ContrastiveTerm(section, 2).loss(rows, batch, 0, 1)

    def e(a: float, b: float) -> float:
        return math.exp(math.cos(a - b) / 0.5)

    first = e(0, 0.3) / (e(0, 0.3) + e(0, 1.9) + e(0, 1.2) + e(0.3, 1.2) + e(0.3, 1.9))
    second = e(1.2, 1.9) / (e(1.2, 1.9) + e(1.2, 0.3) + e(1.2, 0) + e(1.9, 0) + e(1.9, 0.3))
    assert float(loss) == pytest.approx(-(math.log(first) + math.log(second)) / 2, rel=1e-12)


def test_a_single_pair_has_no_negatives_and_no_loss():
    batch = make_batch([make_pack([(1, 11)])], "x")
    for options in ({}, {"negatives": ALL}, {"negatives": ALL, "softmax": "per_side"}):
        loss, shares = term_of(options).loss(vectors()[:2], batch, 0, 1)
        assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
        assert float(shares["embedding/retrieved_fraction"]) == 1


def test_a_matryoshka_dimension_that_is_not_below_the_hidden_size_is_refused():
    with pytest.raises(ConfigError) as error:
        term_of({"matryoshka_dimensions": (4, 8)})
    assert str(error.value) == (
        "objective: matryoshka_dimensions holds 8, the model's embeddings have 8; leave it out, the whole embedding is "
        "always trained"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matryoshka_dimensions": (4, 4)}, r"matryoshka_dimensions \(4, 4\) must ascend"),
        ({"negatives": ("query_to_query",)}, "negatives lacks query_to_document, which holds the positive; add it"),
        ({"negatives": ALL[:1] * 2}, "names a similarity twice"),
        ({"softmax": "per_side"}, "softmax is per_side, but negatives lacks document_to_query"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        term_of(options)
