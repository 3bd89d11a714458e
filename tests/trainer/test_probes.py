"""The torch-side probes equal their naive counterparts."""

import math

import pytest
import torch

from monitors import probes

GROUPS = [[0, 2], [1]]


def some_tensors() -> list[torch.Tensor]:
    """Three tensors of different sizes."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in ((64, 48), (7,), (33, 5))]


def test_norms_equal_naive_ones() -> None:
    """Per tensor and per group."""
    tensors = some_tensors()
    assert torch.allclose(probes.tensor_norms(tensors), torch.stack([t.norm() for t in tensors]))
    naive = [torch.cat([tensors[i].flatten() for i in group]).norm() for group in GROUPS]
    assert torch.allclose(probes.group_norms(tensors, GROUPS), torch.stack(naive))


def test_a_non_finite_element_shows_in_its_group_only() -> None:
    """NaN survives into its own group's norm and leaves the other alone."""
    tensors = some_tensors()
    tensors[1][3] = math.nan
    norms = probes.group_norms(tensors, GROUPS)
    assert norms.isnan().tolist() == [False, True]


def test_slices_that_hold_everything_are_exact() -> None:
    """With slices no smaller than the tensors, norms, means and ratios equal the naive ones."""
    before = some_tensors()
    after = [t + 0.01 * t.square() for t in before]
    slices = probes.SampledSlices(before, GROUPS, elements=10_000)
    for index, group in enumerate(GROUPS):
        old = torch.cat([before[i].flatten() for i in group])
        new = torch.cat([after[i].flatten() for i in group])
        assert slices.norms(slices.take(before))[index].item() == pytest.approx(old.norm().item(), rel=1e-5)
        assert slices.means(slices.take(before))[index].item() == pytest.approx(old.mean().item(), rel=1e-4)
        ratio = slices.ratio(slices.take(before), slices.take(after))[index]
        assert ratio.item() == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-5)


def test_sampled_norms_estimate_the_whole() -> None:
    """A few hundred elements of a large tensor give its norm within a few percent, beside small exact ones."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(512, 256, generator=generator), torch.randn(10, generator=generator)]
    slices = probes.SampledSlices(tensors, [[0], [1]], elements=1000)
    found = slices.norms(slices.take(tensors))
    assert len(slices.take(tensors)) < 1100
    assert found[0].item() == pytest.approx(tensors[0].norm().item(), rel=0.1)
    assert found[1].item() == pytest.approx(tensors[1].norm().item(), rel=1e-5)


def test_sampling_visits_every_column_of_a_power_of_two() -> None:
    """Strides are odd, so a column that explodes is seen."""
    tensor = torch.zeros(512, 256)
    slices = probes.SampledSlices([tensor], [[0]], elements=4096)
    for column in (0, 1, 77, 255):
        tensor.zero_()
        tensor[:, column] = 1
        assert slices.norms(slices.take([tensor])).item() > 0


def test_a_slice_is_a_copy() -> None:
    """What was taken does not change when the weights do."""
    tensor = torch.ones(8)
    slices = probes.SampledSlices([tensor], [[0]])
    sample = slices.take([tensor])
    tensor.zero_()
    assert sample.tolist() == [1.0] * 8


def test_attention_logit_maximum_equals_the_naive_one() -> None:
    """Only pairs that look back count, over all sequences that are sampled, whatever the row chunks."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 2, 3, 1500, 4, generator=generator).unbind(0)
    scores = (query @ key.transpose(-2, -1)) * 0.5
    past = torch.ones(1500, 1500, dtype=torch.bool).tril()
    assert probes.attention_logit_max(query, key, 0.5).item() == pytest.approx(scores[..., past].max().item(), rel=1e-5)
    key[..., -1, :] = 1e6 * query[..., 0, :]  # the last key is in the future of all queries but the last
    peak = probes.attention_logit_max(query, key, 0.5).item()
    scores = (query @ key.transpose(-2, -1)) * 0.5
    assert peak == pytest.approx(scores[..., past].max().item(), rel=1e-5)
    assert peak < scores.max().item()


def block_input() -> tuple[torch.Tensor, torch.Tensor]:
    """A block output (2, 5, 4) and MLP pre-activations (2, 5, 4) with one dead and one saturated unit."""
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(2, 5, 4, generator=generator)
    pre = torch.randn(2, 5, 4, generator=generator)
    pre[..., 1] = -9.0  # both: never active, always beyond the curve of GELU
    pre[..., 2] = 0.0  # dead: as after its weights were zeroed
    pre[..., 3] = 20.0  # saturated
    return output, pre


def test_block_statistics_equal_naive_ones() -> None:
    """RMS, maximum, dead and saturated units of one block."""
    output, pre = block_input()
    active = torch.nn.functional.gelu(pre)
    block = probes.block_statistics(output, pre, active, torch.tensor(3.5))
    figures = probes.group_statistics(probes.stack_statistics([block]), [[0]])
    assert figures.rms.item() == pytest.approx(output.square().mean().sqrt().item(), rel=1e-5)
    assert figures.max_abs.item() == pytest.approx(output.abs().max().item())
    assert figures.dead.item() == 0.5
    assert figures.saturated.item() == 0.5
    assert figures.logit_max.item() == 3.5


def test_statistics_of_micro_batches_merge_to_those_of_the_batch() -> None:
    """A unit that fires in one micro-batch is alive; means average; maxima stay."""
    output, pre = block_input()
    pre[1, :, 2] = 2.0  # alive in the second half only
    active = torch.nn.functional.gelu(pre)
    halves = [
        probes.stack_statistics(
            [probes.block_statistics(output[i : i + 1], pre[i : i + 1], active[i : i + 1], torch.tensor(float(i)))]
        )
        for i in (0, 1)
    ]
    whole = probes.stack_statistics([probes.block_statistics(output, pre, active, torch.tensor(1.0))])
    for merged, expected in zip(probes.merge_statistics(halves), whole, strict=True):
        assert torch.allclose(merged, expected)


def test_groups_fold_their_blocks() -> None:
    """RMS is the root of the mean square, fractions average, maxima are maxima."""
    blocks = probes.BlockStatistics(
        mean_square=torch.tensor([1.0, 9.0, 4.0]),
        max_abs=torch.tensor([1.0, 2.0, 3.0]),
        logit_max=torch.tensor([5.0, 4.0, 3.0]),
        unit_peak=torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]),
        unit_saturated=torch.tensor([[0.4, 0.6], [1.0, 1.0], [0.0, 0.0]]),
    )
    figures = probes.group_statistics(blocks, [[0, 1], [2]])
    assert figures.rms.tolist() == pytest.approx([math.sqrt(5), 2.0])
    assert figures.max_abs.tolist() == [2.0, 3.0]
    assert figures.logit_max.tolist() == [5.0, 3.0]
    assert figures.dead.tolist() == [0.25, 1.0]
    assert figures.saturated.tolist() == [0.75, 0.0]


def test_second_moment_ratio_equals_the_naive_one() -> None:
    """sqrt(mean(g^2 / v_hat)); a steady gradient gives 1, one that jumps tenfold far more."""
    grads = some_tensors()
    slices = probes.SampledSlices(grads, GROUPS, elements=10_000)
    steps, beta2 = torch.tensor(3.0), 0.95
    steady = [g.square() * (1 - beta2**3) for g in grads]
    ones = probes.second_moment_ratio(slices, grads, steady, steps, beta2, 1e-8)
    assert torch.allclose(ones, torch.ones(2), atol=1e-4)
    jumped = probes.second_moment_ratio(slices, [10 * g for g in grads], steady, steps, beta2, 1e-8)
    assert torch.allclose(jumped, torch.full((2,), 10.0), rtol=1e-3)
