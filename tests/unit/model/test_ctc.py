"""CTC loss and greedy reading."""

import pytest
import torch

from model.ctc import CTCHead, ctc_greedy, ctc_loss, ctc_token_counts

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


def test_a_head_over_some_tokens_counts_them_behind_the_blank() -> None:
    head = CTCHead(8, vocab_size=100, blank_id=50, n_tokens=4)
    head.choose({70, 3, 9})
    assert head(torch.zeros(2, 5, 8)).shape == (2, 5, 4)
    assert head.blank == 0
    assert head.to_token_ids([0, 1, 2, 3, 1]) == [50, 3, 9, 70, 3]
    assert head.covered() == {50: 0, 3: 1, 9: 2, 70: 3}
    table = torch.arange(100.0)[:, None]
    assert head.rows_of(table).flatten().tolist() == [50, 3, 9, 70]


def test_a_head_over_the_whole_vocabulary_counts_as_the_llm() -> None:
    head = CTCHead(8, vocab_size=100, blank_id=50)
    assert list(head.state_dict()) == ["weight", "bias"]
    assert (head.out_features, head.blank) == (100, 50)
    assert head.to_token_ids([3, 50]) == [3, 50]
    assert head.covered() == {token: token for token in range(100)}
    assert head.rows_of(table := torch.rand(100, 2)) is table


def test_new_heads_know_valid_tokens() -> None:
    for blank, size in ((0, 5), (3, 4), (9, 1), (9, 10)):
        CTCHead(8, vocab_size=10, blank_id=blank, n_tokens=size).check()


def test_a_head_takes_over_the_outputs_for_its_tokens() -> None:
    whole = CTCHead(8, vocab_size=100, blank_id=50)
    some = CTCHead(8, vocab_size=100, blank_id=50, n_tokens=3)
    some.choose({4, 90})
    some.take_over(whole.weight, whole.bias, range(100))
    frames = torch.randn(7, 8)
    torch.testing.assert_close(some(frames), whole(frames)[:, [50, 4, 90]])
    more = CTCHead(8, vocab_size=100, blank_id=50, n_tokens=4)
    more.choose({4, 30, 90})
    more.take_over(some.weight, some.bias, some.token_ids.tolist())
    torch.testing.assert_close(more(frames)[:, [0, 1, 3]], some(frames))


@pytest.mark.parametrize(
    ("token_ids", "reason"),
    [
        ([4, 9, 50], "begin with 4, wanted the pad token 50"),
        ([50, 9, 4], "do not ascend"),
        ([50, 4, 4], "do not ascend"),
        ([50, 4, 50], "do not ascend"),
        ([50, -1, 4], r"lie in \[-1, 4\], the LLM's in \[0, 100\)"),
        ([50, 4, 100], r"lie in \[4, 100\]"),
        ([50.0, 4.0, 9.0], r"are torch\.float32, wanted torch\.int64"),
    ],
)
def test_tokens_that_are_none_are_refused(token_ids: list[float], reason: str) -> None:
    head = CTCHead(8, vocab_size=100, blank_id=50, n_tokens=3)
    head.token_ids = torch.tensor(token_ids)
    with pytest.raises(ValueError, match=reason):
        head.check()
