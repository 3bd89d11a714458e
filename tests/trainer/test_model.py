"""The GPT: causality, tying, initialisation, and the switches that cure instability."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from monitors.records import LAYER_GROUPS
from tests.trainer.tiny import TOKENS, VOCAB, tiny_model, tiny_tokens
from trainer.contract.config import ModelConfig
from trainer.model import GPT, _rotary_tables, _rotate, blocks_by_group, layer_group, layer_groups, padded_vocab


def gradients(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    """Gradients of the objective, by parameter name."""
    model.zero_grad(set_to_none=True)
    out = model(tokens[:, :-1], tokens[:, 1:])
    (out.losses.mean() + out.penalty).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@given(st.integers(1, 10**6))
def test_padded_vocab_is_the_next_multiple_of_64(size: int) -> None:
    """The padded size holds the vocabulary, divides by 64 and wastes less than 64 rows."""
    padded = padded_vocab(size)
    assert padded % 64 == 0
    assert size <= padded < size + 64


def test_a_future_token_changes_no_past_logits() -> None:
    """Changing token i leaves the logits before i as they were, to the bit, and changes those from i on."""
    model = tiny_model().eval()
    tokens = tiny_tokens()[:, :TOKENS]
    other = tokens.clone()
    other[:, 9] = (other[:, 9] + 1) % VOCAB
    with torch.no_grad():
        before, after = model.logits(tokens), model.logits(other)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_the_order_of_past_tokens_matters() -> None:
    """Rotary positions tell apart two orders of the same earlier tokens."""
    model = tiny_model().eval()
    tokens = tiny_tokens()[:, :TOKENS]
    swapped = tokens.clone()
    swapped[:, [0, 5]] = tokens[:, [5, 0]]
    with torch.no_grad():
        assert not torch.equal(model.logits(tokens)[:, -1], model.logits(swapped)[:, -1])


def test_rotary_logits_depend_on_distance_only() -> None:
    """The same pair of query and key, shifted together, has the same attention logit."""
    for head in (6, 7):
        cos, sin = _rotary_tables(TOKENS, head)
        query, key = torch.randn(2, 1, 1, 1, head).unbind(0)
        q = _rotate(query.expand(1, 1, TOKENS, head), cos, sin)[0, 0]
        k = _rotate(key.expand(1, 1, TOKENS, head), cos, sin)[0, 0]
        scores = q @ k.T
        assert torch.allclose(scores.diagonal(-3), scores[3, 0].expand(TOKENS - 3), atol=1e-5)
        assert torch.allclose(q.norm(dim=-1), query.norm().expand(TOKENS), atol=1e-5)


def test_output_matrix_is_the_embedding() -> None:
    """The head shares its weight with the embedding, as one parameter."""
    model = tiny_model()
    assert model.head.weight is model.embedding.weight
    assert "head.weight" not in dict(model.named_parameters())


def test_loss_at_the_start_is_the_logarithm_of_the_vocabulary() -> None:
    """An untrained model knows nothing: its loss is ln V within a few percent."""
    tokens = tiny_tokens(32)
    losses = tiny_model()(tokens[:, :-1], tokens[:, 1:]).losses
    assert losses.shape == (32,)
    assert losses.mean().item() == pytest.approx(math.log(VOCAB), rel=0.03)


def test_residual_projections_start_smaller() -> None:
    """Projections into the residual stream are scaled by 1/sqrt(2 layers), the other matrices are not (GPT-2)."""
    model = tiny_model(layers=8, width=128)
    std = {name: p.std().item() for name, p in model.named_parameters() if p.ndim == 2}
    assert std["blocks.0.up.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["embedding.weight"] == pytest.approx(0.02, rel=0.05)
    for name in ("blocks.3.down.weight", "blocks.7.attention.proj.weight"):
        assert std[name] == pytest.approx(0.02 / 4, rel=0.05)


def test_losses_equal_cross_entropy_of_the_logits() -> None:
    """The loss of a sequence is the mean over its positions of -log softmax at the target."""
    model = tiny_model()
    tokens = tiny_tokens()
    out = model(tokens[:, :-1], tokens[:, 1:])
    naive = -model.logits(tokens[:, :-1]).log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0].mean(1)
    assert torch.allclose(out.losses, naive, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_bias_switch(bias: bool) -> None:
    """Linear layers have biases exactly when asked for, and they start at zero."""
    biases = [p for name, p in tiny_model(bias=bias).named_parameters() if name.endswith(".bias")]
    assert bool(biases) == bias
    assert all(not p.any() for p in biases)


def test_dropout_acts_in_training_only() -> None:
    """With dropout two training passes differ and two evaluations do not."""
    model = tiny_model(dropout=0.3)
    tokens = tiny_tokens()
    first, second = (model(tokens[:, :-1], tokens[:, 1:]).losses for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    first, second = (model(tokens[:, :-1], tokens[:, 1:]).losses for _ in range(2))
    assert torch.equal(first, second)


def test_qk_norm_bounds_the_attention_logits() -> None:
    """Query-key weights x16 blow up the attention logits, but not with qk_norm."""
    tokens = tiny_tokens()
    peaks = {}
    for qk_norm in (False, True):
        model = tiny_model(qk_norm=qk_norm)
        for scale in (1, 16):
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if name.endswith("qkv.weight"):
                        p[: 2 * 16] *= scale
            statistics = model(tokens[:, :-1], tokens[:, 1:], statistics=True).statistics
            peaks[qk_norm, scale] = statistics.blocks.logit_max.max().item()
    assert peaks[False, 16] > 100 * peaks[False, 1]
    assert peaks[True, 16] == pytest.approx(peaks[True, 1], rel=0.02)
    assert peaks[True, 16] <= math.sqrt(8) * 1.01  # unit RMS: |q.k| / sqrt(d) <= sqrt(d)


def test_z_loss_is_in_the_objective_and_not_in_the_loss() -> None:
    """The penalty is weight * mean(log Z^2); reported losses do not change; gradients do."""
    tokens = tiny_tokens()
    plain, with_z = tiny_model(), tiny_model(z_loss=0.1)
    out, reference = with_z(tokens[:, :-1], tokens[:, 1:]), plain(tokens[:, :-1], tokens[:, 1:])
    log_z = plain.logits(tokens[:, :-1]).logsumexp(-1)
    assert torch.equal(out.losses, reference.losses)
    assert reference.penalty.item() == 0
    assert out.penalty.item() == pytest.approx(0.1 * log_z.square().mean().item(), rel=1e-5)
    pairs = zip(gradients(with_z, tokens).values(), gradients(plain, tokens).values(), strict=True)
    assert not all(torch.allclose(a, b) for a, b in pairs)


def test_embedding_gradient_shrink_scales_the_input_side_only() -> None:
    """Shrink s turns the embedding's gradient into head part + s * input part; nothing else changes."""
    tokens = tiny_tokens()
    full, none, tenth = (gradients(tiny_model(embedding_grad_shrink=shrink), tokens) for shrink in (1.0, 1e-12, 0.1))
    head_part, whole = none["embedding.weight"], full["embedding.weight"]
    assert torch.allclose(tenth["embedding.weight"], head_part + 0.1 * (whole - head_part), atol=1e-6)
    assert not torch.allclose(whole, head_part, atol=1e-4)
    name = "blocks.1.up.weight"
    assert torch.allclose(tenth[name], full[name], atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activation_checkpointing_gives_the_same_gradients(dropout: float) -> None:
    """Recomputing the blocks changes no gradient, with dropout masks drawn again from the same state."""
    tokens = tiny_tokens()
    found = []
    for checkpointing in (False, True):
        model = tiny_model(dropout=dropout, checkpointing=checkpointing)
        torch.manual_seed(5)
        found.append(gradients(model, tokens))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_statistics_do_not_change_the_losses() -> None:
    """Measuring is free of side effects, also under activation checkpointing."""
    tokens = tiny_tokens()
    for checkpointing in (False, True):
        model = tiny_model(checkpointing=checkpointing)
        plain = model(tokens[:, :-1], tokens[:, 1:])
        measured = model(tokens[:, :-1], tokens[:, 1:], statistics=True)
        assert plain.statistics is None
        assert torch.equal(plain.losses, measured.losses)
        measured.losses.mean().backward()
        assert measured.statistics.blocks.unit_peak.shape == (3, 64)


def test_log_z_is_the_mean_log_partition() -> None:
    """The statistic equals logsumexp of the logits, averaged."""
    model, tokens = tiny_model(), tiny_tokens()
    found = model(tokens[:, :-1], tokens[:, 1:], statistics=True).statistics.log_z
    assert found.item() == pytest.approx(model.logits(tokens[:, :-1]).logsumexp(-1).mean().item(), rel=1e-5)


def test_the_graph_has_no_break() -> None:
    """Both variants, with and without statistics, trace as one whole graph."""
    model, tokens = tiny_model(qk_norm=True, z_loss=1e-4), tiny_tokens()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for statistics in (False, True):
        found = compiled(tokens[:, :-1], tokens[:, 1:], statistics).losses
        assert torch.allclose(found, model(tokens[:, :-1], tokens[:, 1:]).losses, atol=1e-6)


def test_too_long_sequences_are_named() -> None:
    """A sequence beyond the positions is an error that says what to change."""
    with pytest.raises(ValueError, match=r"batch\.sequence_tokens"):
        tiny_model().logits(torch.zeros(1, TOKENS + 1, dtype=torch.long))


@given(st.integers(1, 200))
def test_blocks_fall_into_thirds(layers: int) -> None:
    """Every block is in one group, groups are in depth order, and none is more than one larger than another."""
    groups = blocks_by_group(layers)
    assert [i for blocks in groups.values() for i in blocks] == list(range(layers))
    assert list(groups) == [g for g in LAYER_GROUPS if g in groups]
    if layers >= 3:
        sizes = [len(blocks) for blocks in groups.values()]
        assert len(sizes) == 3
        assert max(sizes) - min(sizes) <= 1


def test_every_parameter_has_a_layer_group() -> None:
    """With every switch on, each parameter maps to a known group and each group has some."""
    model = GPT(ModelConfig(layers=3, heads=2, width=16, bias=True, qk_norm=True), VOCAB, TOKENS)
    groups = layer_groups(model)
    assert groups.keys() == dict(model.named_parameters()).keys()
    assert set(groups.values()) == set(LAYER_GROUPS)
    with pytest.raises(ValueError, match="surprise"):
        layer_group("surprise.weight", 3)
