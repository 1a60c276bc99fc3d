"""Invariants: packed equals unpacked, hidden state by hidden state and gradient by gradient, causal and bidirectional,
for 1-token and maximal segments and any grouping of heads; no token sees another segment; a kernel that cannot run
here is refused, never replaced."""

import functools
import inspect
import itertools
import json

import numpy as np
import pytest
import torch
from reference import plain_hidden, plain_model, relative, segments_of
from torch.nn.attention.varlen import varlen_attn

from anchor.config.train_recipe import BackboneSection
from anchor.data.batches import to_tensors
from anchor.data.shards import Pack
from anchor.errors import ConfigError, ModelError
from anchor.models.attention import default_kernel, implementation, segments_attention, varlen_attention
from anchor.models.backbone import load_backbone, load_causal_lm
from anchor.models.embedder import Embedder

CPU = torch.device("cpu")


def random_pack(lengths: list[int], vocabulary: int, seed: int = 0) -> Pack:
    rng = np.random.default_rng(seed)
    n = np.asarray(lengths, dtype=np.int32)
    zeros = np.zeros(len(n), dtype=np.int64)
    ids = rng.integers(0, vocabulary, int(n.sum())).astype(np.int32)
    return Pack(ids, n, zeros.astype(np.int32), n, zeros.astype(np.int8), zeros, zeros)


def directed(model, direction: str):
    if direction == "bidirectional":
        model.config.is_causal = False
    return model


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("model_dir", ["tiny_model_dir", "tiny_untied_model_dir"])
def test_packed_hidden_states_and_gradients_equal_one_text_at_a_time(model_dir, direction, request):
    folder = request.getfixturevalue(model_dir)
    plain = directed(plain_model(folder), direction)
    embedder = Embedder(directed(load_causal_lm(str(folder), torch.float32, "anchor_segments").eval(), direction))
    # The model's heads are grouped; 1 token and the longest position that the model has are among the lengths.
    assert plain.config.num_attention_heads == 2 * plain.config.num_key_value_heads
    pack = random_pack([1, 17, plain.config.max_position_embeddings, 2, 1, 31], plain.config.vocab_size)
    tensors = to_tensors(pack, CPU)
    inputs = embedder.embed_tokens(tensors.input_ids)
    states = embedder.anchor_states(tensors, inputs)
    hidden = embedder.hidden_states(inputs, tensors.position_ids, tensors.cu_seqlens, tensors.max_length)
    expected = torch.cat([plain_hidden(plain, segment["ids"]) for segment in segments_of(pack)])
    torch.testing.assert_close(hidden, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states, hidden[tensors.cu_seqlens[1:].long() - 1])

    probe = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    (hidden * probe).sum().backward()
    (expected * probe).sum().backward()
    theirs = dict(plain.named_parameters())
    compared = 0
    for name, parameter in embedder.causal_lm.named_parameters():
        if theirs[name].grad is not None:
            assert relative(parameter.grad, theirs[name].grad) < 1e-4, name
            compared += 1
    assert compared > 10


def naive_attention(query, key, value, lengths: list[int], *, scaling: float, causal: bool) -> torch.Tensor:
    """Softmax of scores, one segment, head and token at a time."""
    out, groups = torch.zeros_like(query), query.shape[1] // key.shape[1]
    starts = np.cumsum([0, *lengths])
    for start, end in itertools.pairwise(starts):
        for head in range(query.shape[1]):
            for t in range(start, end):
                seen = slice(start, t + 1 if causal else end)
                scores = key[0, head // groups, seen] @ query[0, head, t] * scaling
                out[0, head, t] = scores.softmax(dim=0) @ value[0, head // groups, seen]
    return out.transpose(1, 2)


LENGTHS = {
    "one token": [1],
    "only single tokens": [1, 1, 1],
    "one segment is the whole pack": [24],
    "single tokens around a long one": [1, 21, 1],
    "mixed": [5, 1, 9, 2],
}


def heads(lengths: list[int], num_heads: int, num_groups: int, **options):
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, n, sum(lengths), 16) for n in (num_heads, num_groups, num_groups)]
    drawn = [torch.randn(shape, generator=draw, dtype=torch.float64).to(**options) for shape in shapes]
    return [tensor.requires_grad_() for tensor in drawn]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_segments_kernel_equals_loops_over_tokens_forward_and_backward(lengths, num_groups, causal):
    ours, theirs = (heads(lengths, 4, num_groups) for _ in range(2))
    boundaries = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    out, _ = segments_attention(
        torch.nn.Identity(), *ours, None,
        cu_seq_lens_q=boundaries, max_length_q=max(lengths), scaling=0.3, is_causal=causal,
    )  # fmt: skip
    expected = naive_attention(*theirs, lengths, scaling=0.3, causal=causal)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * probe).sum().backward()
    (expected * probe).sum().backward()
    assert float(ours[2].grad.norm()) > 0
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad, rtol=1e-10, atol=1e-12)


def with_groups(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """Stand in for torch's CUDA-only kernel: ``T H D``, heads grouped only with ``enable_gqa``."""
    assert (k.shape[1] == q.shape[1]) or enable_gqa
    lengths = cu_q.diff().tolist()
    tensors = (t.transpose(0, 1)[None] for t in (q, k, v))
    return naive_attention(*tensors, lengths, scaling=scale, causal=window_size == (-1, 0))[0]


def without_groups(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
    """Stand in for the kernel of a torch without the argument ``enable_gqa``."""
    return with_groups(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [with_groups, without_groups])
def test_varlen_hands_heads_over_as_the_kernel_takes_them(kernel, num_groups, causal, monkeypatch):
    handed = []

    @functools.wraps(kernel)
    def watched(q, k, v, *args, **kwargs):
        handed.append([t.shape[1] for t in (q, k, v)])
        return kernel(q, k, v, *args, **kwargs)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", watched)
    lengths = LENGTHS["mixed"]
    ours, theirs = (heads(lengths, 4, num_groups) for _ in range(2))
    boundaries = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    out, _ = varlen_attention(
        torch.nn.Identity(), *ours, None,
        cu_seq_lens_q=boundaries, max_length_q=max(lengths), scaling=0.3, is_causal=causal,
    )  # fmt: skip
    # Repeated keys and values cost memory and time, so they are repeated only where the kernel knows no groups.
    given = num_groups if kernel is with_groups else 4
    assert handed == [[4, given, given]]
    torch.testing.assert_close(out, naive_attention(*theirs, lengths, scaling=0.3, causal=causal))


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="older kernels may not")
def test_this_torch_takes_grouped_heads():
    assert "enable_gqa" in inspect.signature(varlen_attn).parameters


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_varlen_kernel_equals_the_segments_kernel_on_cuda(lengths, num_groups, causal):
    options = {"device": "cuda", "dtype": torch.bfloat16}
    boundaries = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
    results = []
    for kernel in (varlen_attention, segments_attention):
        tensors = [t.detach().requires_grad_() for t in heads(lengths, 4, num_groups, **options)]
        out, _ = kernel(
            torch.nn.Identity(), *tensors, None,
            cu_seq_lens_q=boundaries, max_length_q=max(lengths), scaling=0.3, is_causal=causal,
        )  # fmt: skip
        out.float().square().sum().backward()
        results.append([out, *(t.grad for t in tensors)])
    for mine, wanted in zip(*results, strict=True):
        assert relative(mine.float(), wanted.float()) < 2e-2 or float(wanted.float().norm()) < 1e-3


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_the_last_token_moves_the_first_only_where_attention_is_bidirectional(tiny_model_dir, direction):
    model = directed(load_causal_lm(str(tiny_model_dir), torch.float32, "anchor_segments").eval(), direction)
    embedder = Embedder(model)

    def hidden(pack: Pack) -> torch.Tensor:
        tensors = to_tensors(pack, CPU)
        inputs = embedder.embed_tokens(tensors.input_ids)
        return embedder.hidden_states(inputs, tensors.position_ids, tensors.cu_seqlens, tensors.max_length)

    pack = random_pack([9, 12], model.config.vocab_size)
    before = hidden(pack)
    pack.input_ids[8] = (pack.input_ids[8] + 1) % model.config.vocab_size
    after = hidden(pack)
    assert torch.equal(before[0], after[0]) == (direction == "causal")
    assert not torch.allclose(before[8], after[8])
    assert torch.equal(before[9:], after[9:])


def backbone_section(path, direction: str) -> BackboneSection:
    return BackboneSection.model_validate(
        {"path": str(path), "trained": {"kind": "full"}, "attention": "segments", "direction": direction}
    )


def test_the_direction_is_saved_with_the_model_and_a_causal_recipe_refuses_it(tiny_model_dir, tmp_path):
    load = functools.partial(load_backbone, dtype=torch.float32, device_type="cpu", work_dir=tmp_path)
    causal = load(backbone_section(tiny_model_dir, "causal"))
    assert "is_causal" not in causal.config.to_dict()
    saved = tmp_path / "bidirectional"
    load(backbone_section(tiny_model_dir, "bidirectional")).save_pretrained(saved)
    assert json.loads((saved / "config.json").read_text())["is_causal"] is False
    pack = to_tensors(random_pack([9, 12], causal.config.vocab_size), CPU)
    again, before = Embedder(load(backbone_section(saved, "bidirectional")).eval())(pack), Embedder(causal.eval())(pack)
    assert not torch.allclose(again, before, atol=1e-3)
    plain = plain_model(saved)
    expected = torch.stack([plain_hidden(plain, s["ids"])[-1] for s in segments_of(pack.pack)])
    torch.testing.assert_close(again, torch.nn.functional.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError) as error:
        load(backbone_section(saved, "causal"))
    assert str(error.value) == (
        f"backbone.direction is causal, but {saved} was trained bidirectional (is_causal or "
        "use_bidirectional_attention in its config.json); set "
        "backbone.direction: bidirectional"
    )


def test_no_token_sees_another_segment(tiny_model_dir):
    model = load_causal_lm(str(tiny_model_dir), torch.float32, "anchor_segments").eval()
    embedder = Embedder(model)
    pack = random_pack([9, 12, 5], model.config.vocab_size)
    before = embedder(to_tensors(pack, CPU))
    pack.input_ids[9:21] = (pack.input_ids[9:21] + 1) % model.config.vocab_size
    after = embedder(to_tensors(pack, CPU))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert not torch.allclose(before[1], after[1])


def test_order_of_segments_does_not_change_their_embeddings(tiny_model_dir):
    model = load_causal_lm(str(tiny_model_dir), torch.float32, "anchor_segments").eval()
    pack = random_pack([9, 12], model.config.vocab_size)
    parts = np.split(pack.input_ids, [9])
    turned = Pack(
        np.concatenate(parts[::-1]), pack.segment_lengths[::-1].copy(), *(getattr(pack, n) for n in (
            "body_starts", "body_ends", "roles", "pair_ids", "text_ids"))
    )  # fmt: skip
    vectors = Embedder(model)(to_tensors(pack, CPU))
    torch.testing.assert_close(Embedder(model)(to_tensors(turned, CPU)), vectors.flip(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            "flash",
            "backbone.attention is 'flash', which needs CUDA and the flash-attn package (requirements-gpu.txt); "
            "install it, or use 'varlen' on CUDA or 'segments' anywhere",
        ),
        ("varlen", "backbone.attention is 'varlen', which needs CUDA; use 'segments' on this machine"),
    ],
)
def test_a_kernel_that_cannot_run_here_is_refused(kernel, message):
    with pytest.raises(ModelError) as error:
        implementation(kernel, "cpu", torch.bfloat16)
    assert str(error.value) == message


def test_a_kernel_is_chosen_that_has_the_dtype():
    for device, dtype in itertools.product(("cpu", "cuda"), (torch.float32, torch.bfloat16)):
        kernel = default_kernel(device, dtype)
        assert implementation(kernel, device, dtype) == f"anchor_{kernel}"
    assert default_kernel("cuda", torch.bfloat16) == "varlen"
    with pytest.raises(ModelError, match="attention is 'varlen', whose kernel knows no fp32; use bf16, or 'segments'"):
        implementation("varlen", "cuda", torch.float32)


def test_a_segment_beyond_the_sliding_window_is_refused():
    heads = torch.randn(1, 2, 12, 4)
    boundaries = torch.tensor([0, 12], dtype=torch.int32)
    with pytest.raises(ModelError, match="the model attends 8 tokens back, a segment has 12"):
        segments_attention(
            torch.nn.Identity(), heads, heads, heads, None,
            cu_seq_lens_q=boundaries, max_length_q=12, scaling=0.5, sliding_window=8,
        )  # fmt: skip
