"""CTC loss and greedy reading."""

import torch

from model.ctc import ctc_greedy, ctc_loss, ctc_token_counts

BLANK = 0


def one_hot(path: list[int], size: int = 4) -> torch.Tensor:
    return 50.0 * torch.nn.functional.one_hot(torch.tensor([path]), size).float()


def test_greedy_merges_repeats_and_removes_blanks() -> None:
    logits = one_hot([1, 1, 0, 1, 2, 2, 0, 3])
    assert ctc_greedy(logits, torch.tensor([8]), BLANK) == [[1, 1, 2, 3]]


def test_tokens_are_counted_up_to_the_end_of_each_stack() -> None:
    logits = one_hot([0, 1, 1, 0, 1, 2, 2, 0, 3])
    counts = ctc_token_counts(logits, torch.tensor([9]), BLANK, 2)
    assert counts.tolist() == [[1, 1, 3, 3, 4]]
    assert ctc_token_counts(logits, torch.tensor([5]), BLANK, 2)[0, :3].tolist() == [1, 1, 2]
    assert ctc_token_counts(logits, torch.tensor([9]), BLANK, 4).tolist() == [[1, 3, 4]]


def test_greedy_stops_at_the_clip_s_length() -> None:
    assert ctc_greedy(one_hot([1, 2, 3]), torch.tensor([2]), BLANK) == [[1, 2]]


def test_loss_is_zero_for_a_certain_right_path_and_not_for_a_wrong_one() -> None:
    lens, target_lens = torch.tensor([4]), torch.tensor([2])
    logits = one_hot([1, 0, 2, 2])
    right = ctc_loss(logits, lens, torch.tensor([[1, 2]]), target_lens, BLANK)
    wrong = ctc_loss(logits, lens, torch.tensor([[3, 2]]), target_lens, BLANK)
    assert right < 1e-3
    assert wrong > 10


def test_padding_adds_nothing() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 9, 5)
    targets, target_lens = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1])
    both = ctc_loss(logits, torch.tensor([9, 5]), targets, target_lens, BLANK)
    first = ctc_loss(logits[:1], torch.tensor([9]), targets[:1], target_lens[:1], BLANK)
    second = ctc_loss(logits[1:, :5], torch.tensor([5]), targets[1:, :1], target_lens[1:], BLANK)
    torch.testing.assert_close(both, (3 * first + second) / 4)


def test_a_clip_without_speech_is_learnt_as_blanks() -> None:
    targets, lens = torch.zeros(1, 0, dtype=torch.long), torch.tensor([3])
    silent = ctc_loss(one_hot([0, 0, 0]), lens, targets, torch.tensor([0]), BLANK)
    spoken = ctc_loss(one_hot([1, 0, 0]), lens, targets, torch.tensor([0]), BLANK)
    assert silent < 1e-3
    assert spoken > 10


def test_a_target_longer_than_its_clip_adds_nothing() -> None:
    targets = torch.tensor([[1, 2, 3]])
    loss = ctc_loss(one_hot([1, 2]), torch.tensor([2]), targets, torch.tensor([3]), BLANK)
    assert loss == 0
