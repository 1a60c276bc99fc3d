"""Invariants: packed equals unpacked, hidden state by hidden state and gradient by gradient; no token sees another
segment; a kernel that cannot run here is refused, never replaced."""

import numpy as np
import pytest
import torch
from reference import plain_hidden, plain_model, relative, segments_of

from anchor.data.batches import to_tensors
from anchor.data.shards import Pack
from anchor.errors import ModelError
from anchor.models.attention import implementation, segments_attention
from anchor.models.backbone import load_causal_lm
from anchor.models.embedder import Embedder

CPU = torch.device("cpu")


def random_pack(lengths: list[int], vocabulary: int, seed: int = 0) -> Pack:
    rng = np.random.default_rng(seed)
    n = np.asarray(lengths, dtype=np.int32)
    zeros = np.zeros(len(n), dtype=np.int64)
    ids = rng.integers(0, vocabulary, int(n.sum())).astype(np.int32)
    return Pack(ids, n, zeros.astype(np.int32), n, zeros.astype(np.int8), zeros, zeros)


@pytest.mark.parametrize("model_dir", ["tiny_model_dir", "tiny_untied_model_dir"])
def test_packed_hidden_states_and_gradients_equal_one_text_at_a_time(model_dir, request):
    folder = request.getfixturevalue(model_dir)
    plain = plain_model(folder)
    embedder = Embedder(load_causal_lm(str(folder), torch.float32, "anchor_segments").eval())
    pack = random_pack([1, 17, 64, 2, 31], plain.config.vocab_size)
    tensors = to_tensors(pack, CPU)
    states, inputs = embedder.anchor_states(tensors)
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
        implementation(kernel, "cpu")
    assert str(error.value) == message


def test_a_segment_beyond_the_sliding_window_is_refused():
    heads = torch.randn(1, 2, 12, 4)
    boundaries = torch.tensor([0, 12], dtype=torch.int32)
    with pytest.raises(ModelError, match="the model attends 8 tokens back, a segment has 12"):
        segments_attention(
            torch.nn.Identity(), heads, heads, heads, None,
            cu_seq_lens_q=boundaries, max_length_q=12, scaling=0.5, sliding_window=8,
        )  # fmt: skip
