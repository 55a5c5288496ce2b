"""Recall: what texts hold, and that an answer counts where it would be generated."""

import pytest
import torch

from transpoint.distill.errors import RunError
from transpoint.distill.measure.recall import (
    KEYS,
    TASKS,
    WORDS,
    Item,
    answered,
    keys_in_text,
    measure_recall,
    pairs_in_list,
)
from transpoint.distill.settings import RECALL
from transpoint.teachers.random import random_teacher

TEXT = torch.randint(97, 122, (3000,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def loaded():
    teacher, tokenizer = random_teacher("random-llama")
    return teacher.requires_grad_(False), tokenizer


def text_of(tokenizer, tokens):
    return tokenizer.decode(tokens)


@pytest.mark.parametrize("keys", [1, 4])
def test_a_number_stands_in_the_text_once_and_is_asked_for(loaded, keys):
    tokenizer = loaded[1]
    items = keys_in_text(tokenizer, TEXT, 600, 8, keys)
    assert [item.depth for item in items] == [(i + 0.5) / 8 for i in range(8)]
    for item in items:
        ((a, b),) = item.answers
        text, answer = text_of(tokenizer, item.tokens[:a]), text_of(tokenizer, item.tokens[a:b]).strip()
        question = text.rpartition("Remember: ")[2]
        word = question.removeprefix("the number of the ").removesuffix(" is").strip()
        assert answer.isdigit() and len(answer) == 5
        assert text.count(f"The number of the {word} is {answer}.") == 1 and text.count("The number of") == keys
        assert a < len(item.tokens) == b == 600
        assert abs(text.index(answer) / a - item.depth) < 0.3


def test_fewer_numbers_where_the_text_is_short(loaded):
    (item,) = keys_in_text(loaded[1], TEXT, 200, 1, KEYS)
    assert 1 <= text_of(loaded[1], item.tokens).count("The number of") < KEYS


def test_pairs_come_again_in_another_order(loaded):
    tokenizer = loaded[1]
    (item,) = pairs_in_list(tokenizer, TEXT, 300, 1)
    first, second = text_of(tokenizer, item.tokens).removeprefix("A list:").split("\n\nThe list again:")
    lines = [part.strip().split("\n") for part in (first, second)]
    assert sorted(lines[0]) == sorted(lines[1]) and lines[0] != lines[1] and len(lines[0]) > 5
    assert [text_of(tokenizer, item.tokens[a:b]).strip() for a, b in item.answers] == [
        line.partition(": ")[2] for line in lines[1]
    ]
    assert len(item.tokens) <= 300


def test_between_lists_of_all_words_stands_text(loaded):
    tokenizer = loaded[1]
    (item,) = pairs_in_list(tokenizer, TEXT, 4000, 1)
    text = text_of(tokenizer, item.tokens)
    assert len(item.tokens) == 4000 and len(item.answers) == len(WORDS)
    first, second = text.split("\n\nThe list again:")
    assert len(first) > len(second) + 1000 and len(set(second.split("\n"))) == len(WORDS) + 1
    with pytest.raises(RunError, match="the text has 3000"):
        pairs_in_list(tokenizer, TEXT, 9000, 1)


def test_the_names_of_tasks_are_those_of_settings():
    assert tuple(TASKS) == RECALL


@pytest.mark.parametrize("task", TASKS)
def test_the_same_again_by_seed(loaded, task):
    one, same, other = (TASKS[task](loaded[1], TEXT, 300, 3, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a.tokens, b.tokens) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_too_short(loaded, task):
    with pytest.raises(RunError, match="give a larger length"):
        TASKS[task](loaded[1], TEXT, 12, 1, 0)


def test_too_little_text(loaded):
    with pytest.raises(RunError, match="the text has only 100 tokens"):
        keys_in_text(loaded[1], TEXT[:100], 600, 1)


def test_an_answer_counts_where_it_would_be_generated(loaded):
    teacher = loaded[0]
    prompts = [TEXT[:20], TEXT[40:57]]
    items, wanted = [], []
    for prompt in prompts:
        options = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None, "pad_token_id": 0}
        whole = teacher.generate(prompt[None], **options)[0]
        items.append(Item(whole, [(len(prompt), len(whole))]))
        for place in range(3):
            other = whole.clone()
            other[len(prompt) + place] += 1
            items.append(Item(other, [(len(prompt), len(whole))]))
        wanted += [True, False, False, False]
    found = answered(teacher, items)
    assert [right for ((right, _),) in found] == wanted
    for item, ((_, logprob),) in zip(items, found, strict=True):
        logprobs = teacher(item.tokens[None, :-1]).logits[0].log_softmax(-1)
        a, b = item.answers[0]
        own = logprobs[a - 1 : b - 1].gather(1, item.tokens[a:b, None]).sum().item()
        assert logprob == pytest.approx(own, abs=1e-4)


def test_records(loaded):
    teacher, tokenizer = loaded
    records = measure_recall(teacher, tokenizer, TEXT, list(TASKS), [200, 300], 3)
    assert [(one.task, one.length) for one in records] == [(task, n) for task in TASKS for n in (200, 300)]
    for one in records:
        assert one.accuracy == 0 and one.logprob < -5  # of a random model
        assert one.answers == (3 if one.depths else one.answers) and len(one.depths) == len(one.right)
