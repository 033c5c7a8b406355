from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from telos.data.batches import Pairs, Rollouts, Sequences, concatenate, field_names, join, mask, pad_1d, trim

ROWS = st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=1, max_size=5)


def rollouts(completions: list[list[int]], first: int = 0) -> Rollouts:
    n = len(completions)
    prompt_ids, prompt_length = pad_1d([[7] * (first + i + 1) for i in range(n)])
    completion_ids, completion_length = pad_1d(completions)
    return Rollouts(
        prompt_ids=prompt_ids,
        prompt_length=prompt_length,
        completion_ids=completion_ids,
        completion_length=completion_length,
        action_mask=mask(completion_length, completion_ids.shape[1]),
        logprobs=-completion_ids.float(),
        ended=torch.ones(n, dtype=torch.bool),
        group=torch.arange(n) + first,
        reward=torch.ones(n),
        reward_status=torch.zeros(n, dtype=torch.int8),
        temperature=torch.ones(n),
        weight_version=torch.zeros(n, dtype=torch.int64),
        row=torch.arange(n) + first,
        batch_size=[n],
    )


def test_pad_1d_pads_on_the_right_with_zero() -> None:
    values, lengths = pad_1d([[5, 6, 7], [], [8]])
    assert values.tolist() == [[5, 6, 7], [0, 0, 0], [8, 0, 0]]
    assert lengths.tolist() == [3, 0, 1]
    assert values.dtype == lengths.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_pad_1d_takes_the_dtype_it_is_given(dtype: torch.dtype) -> None:
    values, _ = pad_1d([np.array([1, 0], dtype=np.int32), [1]], dtype)
    assert values.dtype == dtype
    assert values.tolist() == [[1, 0], [1, 0]]


def test_pad_1d_never_makes_an_axis_of_width_zero() -> None:
    assert pad_1d([[], []])[0].shape == (2, 1)
    assert pad_1d([])[0].shape == (0, 1)


def test_mask_is_true_on_the_first_length_positions() -> None:
    assert mask(torch.tensor([0, 2, 3]), 3).tolist() == [[False] * 3, [True, True, False], [True] * 3]


@given(ROWS, st.data())
@settings(max_examples=40, deadline=None)
def test_join_leaves_no_gap_and_reads_no_padding(prompts: list[list[int]], data: st.DataObject) -> None:
    completions = data.draw(st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=len(prompts), max_size=len(prompts)))
    (p, pl), (c, cl) = pad_1d(prompts), pad_1d(completions)
    p[~mask(pl, p.shape[1])] = 77  # junk where nothing may look
    c[~mask(cl, c.shape[1])] = 66
    joined = join(p, pl, c, cl)
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        whole = prompt + completion
        assert joined.ids[b].tolist() == whole + [0] * (joined.ids.shape[1] - len(whole))
        assert joined.length[b] == len(whole)
        learnt = [t for t in range(len(whole)) if t >= len(prompt) and t > 0]
        assert joined.loss_mask[b].nonzero().flatten().tolist() == learnt


def test_slices_and_splits_keep_the_type_and_the_rows() -> None:
    batch = rollouts([[1, 2], [3], [4, 5, 6]])
    assert isinstance(batch[1:], Rollouts)
    assert batch[1:].row.tolist() == [1, 2]
    assert batch[torch.tensor([2, 0])].completion_length.tolist() == [3, 2]
    assert [part.row.tolist() for part in batch.split(2)] == [[0, 1], [2]]
    assert isinstance(batch.split(2)[0], Rollouts)


def test_a_field_with_another_number_of_rows_is_refused() -> None:
    with pytest.raises(RuntimeError, match="batch dimension mismatch"):
        Sequences(ids=torch.zeros(2, 3), length=torch.ones(3), loss_mask=torch.ones(2, 3), batch_size=[2])


def test_concatenate_pads_every_ragged_field_to_the_widest() -> None:
    whole = concatenate([rollouts([[1, 2], [3]]), rollouts([[4, 5, 6]], first=2)])
    assert whole.batch_size == torch.Size([3])
    assert whole.completion_ids.tolist() == [[1, 2, 0], [3, 0, 0], [4, 5, 6]]
    assert whole.logprobs.tolist() == [[-1, -2, 0], [-3, 0, 0], [-4, -5, -6]]
    assert whole.action_mask.tolist() == [[True, True, False], [True, False, False], [True] * 3]
    assert whole.prompt_ids.shape == (3, 3)
    assert whole.row.tolist() == [0, 1, 2]
    assert whole.action_mask.dtype == torch.bool
    assert whole.reward_status.dtype == torch.int8


def test_the_support_of_sampling_is_padded_by_minus_one_and_trimmed() -> None:
    first, second = rollouts([[1, 2], [3]]), rollouts([[4, 5, 6]], first=2)
    first.support = torch.full((2, 2, 1), 9)
    second.support = torch.full((1, 3, 2), 8)
    whole = concatenate([first, second])
    assert whole.support is not None
    assert whole.support.tolist() == [[[9, -1], [9, -1], [-1, -1]]] * 2 + [[[8, 8]] * 3]
    narrow = trim(whole[:2]).support
    assert narrow is not None
    assert narrow.shape == (2, 2, 2)
    with pytest.raises(ValueError, match="support is there in some"):
        concatenate([first, rollouts([[1]])])


@given(ROWS, st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_splitting_trimming_and_concatenating_gives_the_same_batch(completions: list[list[int]], size: int) -> None:
    batch = rollouts(completions)
    again = concatenate([trim(part) for part in batch.split(size)])
    optional = {"support", "greedy_reward"}
    assert all(getattr(again, name) is None for name in optional)
    for name in set(field_names(Rollouts)) - optional:
        assert torch.equal(getattr(batch, name), getattr(again, name)), name


def test_trim_cuts_each_ragged_field_by_its_own_length() -> None:
    wide = torch.arange(10).reshape(2, 5)
    one = torch.tensor([1, 2])
    pairs = Pairs(
        prompt_ids=wide,
        prompt_length=one,
        chosen_ids=wide,
        chosen_length=one + 1,
        rejected_ids=wide,
        rejected_length=one - 1,
        margin=torch.zeros(2),
        row=one,
        batch_size=[2],
    )
    cut = trim(pairs)
    assert [cut.prompt_ids.shape[1], cut.chosen_ids.shape[1], cut.rejected_ids.shape[1]] == [2, 3, 1]
    assert pairs.prompt_ids.shape[1] == 5  # the original stays


def test_batches_of_different_types_do_not_concatenate() -> None:
    sequences = join(*pad_1d([[1]]), *pad_1d([[2]]))
    with pytest.raises(TypeError, match="Rollouts"):
        concatenate([sequences, rollouts([[1]])])
    with pytest.raises(ValueError, match="at least one"):
        concatenate([])
