"""Whether a model finds again what it has read: a number in a long text, one of several, and pairs in a list.

Texts are cut from real ones; what is to be found stands in sentences of its own between them. An answer counts where
the model gives each of its tokens the highest probability, after the true ones before it: it would then have generated
it. So one pass over the text is enough, and needs no cache.

Passkey: Mohtashami & Jaggi 2023 (arXiv 2305.16300); one key of several: RULER's multi-key retrieval (arXiv 2404.06654);
pairs: multi-query associative recall (arXiv 2312.04927), with words and numbers of the tokenizer at hand.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...teachers import OutputHead, output_head
from ..errors import RunError
from ..run.records import Recall
from ..run.seconds import part
from ..tokenizers import beginning

WORDS = (
    "acorn amber anchor apple arrow autumn badge basket beacon bell bottle branch bridge bronze bucket button cabin "
    "candle canyon carpet castle cedar cherry circle clover coffee copper coral cotton cradle crystal desert diamond "
    "dragon eagle ember engine falcon feather fiddle flower forest garden ginger glacier hammer harbor hazel helmet "
    "honey island ivory jacket jasmine jungle kettle ladder lantern lemon lily marble meadow mirror needle olive "
    "orchard otter palace panther pearl pepper pigeon pillow planet pocket prairie pumpkin quartz rabbit raven ribbon "
    "river rocket saddle saffron salmon silver spider spruce summer temple thunder tiger timber tulip turtle valley "
    "velvet violet walnut whistle willow winter"
).split()
NEEDLE, QUESTION = "\n\nThe number of the {word} is {number}.\n\n", "\n\nRemember: the number of the {word} is"
KEYS = 8  # numbers in a text, where one is asked for among several
BATCH_TOKENS = 16384  # in one pass


@dataclass(frozen=True)
class Item:
    """Tokens (L,) with answers in them, each a span [first, last) that the tokens before it tell."""

    tokens: Tensor
    answers: list[tuple[int, int]]
    depth: float | None = None  # where in the text the answer stands: 0 at its beginning, 1 at its end


def keys_in_text(
    tokenizer: PreTrainedTokenizerBase, text: Tensor, length: int, count: int, keys: int = 1, seed: int = 0
) -> list[Item]:
    """Texts of `length` tokens with up to `keys` numbers in them, which fill at most half of it, and the question for
    one, which lies at depths evenly spread over all of `count` texts.

    Args:
        text: tokens (T,) that texts are cut from.

    Raises:
        RunError: the text, or `length`, is too short.
    """
    chance = random.Random(f"{seed} {length} {keys}")  # noqa: S311 - data, no secrets
    begin = beginning(tokenizer)
    items = []
    for i in range(count):
        words = chance.sample(WORDS, keys)
        numbers = [str(chance.randrange(10_000, 100_000)) for _ in words]
        needles = [_plain(tokenizer, NEEDLE.format(word=w, number=n)) for w, n in zip(words, numbers, strict=True)]
        # With its space, as it stands in the text.
        question = _plain(tokenizer, QUESTION.format(word=words[0]))
        whole = _plain(tokenizer, QUESTION.format(word=words[0]) + f" {numbers[0]}")
        same = next((j for j, (a, b) in enumerate(zip(question, whole, strict=False)) if a != b), len(question))
        question, answer = whole[:same], whole[same:]
        while len(needles) > 1 and sum(map(len, needles)) > length // 2:
            needles.pop()
        room = length - len(begin) - sum(map(len, needles)) - len(whole)
        if room < 1 or len(text) < room:
            raise RunError(
                f"no text of {length} tokens with a number in it can be made"
                + (": give a larger length" if room < 1 else f": the text has only {len(text)} tokens, give more")
            )
        first = chance.randrange(len(text) - room + 1)
        filler = text[first : first + room].tolist()
        depth = (i + 0.5) / count
        places = [round(depth * room), *(chance.randrange(room + 1) for _ in needles[1:])]
        tokens, done = list(begin), 0
        for place, needle in sorted(zip(places, needles, strict=True), key=lambda pair: pair[0]):
            tokens += filler[done:place] + needle
            done = place
        tokens += filler[done:] + question
        items.append(Item(torch.tensor(tokens + answer), [(len(tokens), len(tokens) + len(answer))], depth))
    return items


def pairs_in_list(
    tokenizer: PreTrainedTokenizerBase, text: Tensor, length: int, count: int, seed: int = 0
) -> list[Item]:
    """Lists of words with a number each, and then the same again in another order: every number is an answer.

    In `length` tokens, as many pairs as fit; where there are more tokens than words, `text` stands between the lists.
    Raises RunError where not one pair fits, or the text is too short.
    """
    chance = random.Random(f"{seed} {length} pairs")  # noqa: S311 - data, no secrets
    items = []
    for _ in range(count):
        words = chance.sample(WORDS, len(WORDS))
        pairs = [(word, str(chance.randrange(100, 1000))) for word in words]
        # Each line on its own, so that tokens of the two lists are the same.
        lines = [(_plain(tokenizer, f"\n{word}:"), _plain(tokenizer, f" {number}")) for word, number in pairs]
        begin = [*beginning(tokenizer), *_plain(tokenizer, "A list:")]
        between = _plain(tokenizer, "\n\nThe list again:")
        room, held = (length - len(begin) - len(between)) // 2, 0
        while held < len(lines) and sum(len(w) + len(n) for w, n in lines[: held + 1]) <= room:
            held += 1
        if not held:
            raise RunError(f"no list fits in {length} tokens: give a larger length")
        first = begin + [token for word, number in lines[:held] for token in word + number]
        second = [(word, number) for word, number in chance.sample(lines[:held], held)]
        left = length - len(first) - len(between) - sum(len(w) + len(n) for w, n in second) if held == len(lines) else 0
        if left > len(text):
            raise RunError(f"no list with text after it of {length} tokens can be made: the text has {len(text)}")
        start = chance.randrange(len(text) - left + 1)
        tokens, answers = first + text[start : start + left].tolist() + between, []
        for word, number in second:
            tokens += word
            answers.append((len(tokens), len(tokens) + len(number)))
            tokens += number
        items.append(Item(torch.tensor(tokens), answers))
    return items


TASKS: dict[str, Callable[[PreTrainedTokenizerBase, Tensor, int, int, int], list[Item]]] = {
    "passkey": lambda tokenizer, text, length, count, seed: keys_in_text(tokenizer, text, length, count, 1, seed),
    "multikey": lambda tokenizer, text, length, count, seed: keys_in_text(tokenizer, text, length, count, KEYS, seed),
    "pairs": pairs_in_list,
}


@torch.no_grad()
def answered(model: PreTrainedModel, items: Sequence[Item]) -> list[list[tuple[bool, float]]]:
    """For each item and answer: whether the model gives it, and its log-probability in nats."""
    head, training, found = output_head(model, check=False), model.training, []
    model.eval()
    for batch in in_batches(items, BATCH_TOKENS):
        ids, answers = stacked(batch).to(model.device), [item.answers for item in batch]
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        own, right = (part.tolist() for part in answer_tokens(head, hidden, ids, answers))
        done = 0
        for spans in answers:
            scores = []
            for a, b in spans:
                part = slice(done, done := done + b - a)
                scores.append((all(right[part]), sum(own[part])))
            found.append(scores)
    model.train(training)
    return found


def answer_tokens(
    head: OutputHead, hidden: Tensor, ids: Tensor, answers: list[list[tuple[int, int]]]
) -> tuple[Tensor, Tensor]:
    """Of each token of each answer, row by row: its log-probability, and whether it is the most likely one.

    Args:
        hidden: last hidden states (n, L, D) of tokens `ids` (n, L).
        answers: of each row, its spans.
    """
    spans = ((row, a, b) for row, parts in enumerate(answers) for a, b in parts)
    rows, places = zip(*((row, place) for row, a, b in spans for place in range(a, b)), strict=True)
    row, place = torch.tensor(rows, device=ids.device), torch.tensor(places, device=ids.device)
    true = ids[row, place]
    logprobs = head.logits(hidden[row, place - 1]).float().log_softmax(-1)
    return logprobs.gather(1, true[:, None])[:, 0], logprobs.argmax(-1) == true


def in_batches(items: Sequence[Item], tokens: int) -> Iterator[Sequence[Item]]:
    """Items by so many that a pass has at most `tokens`, or by one."""
    size = max(1, tokens // max((len(item.tokens) for item in items), default=1))
    for first in range(0, len(items), size):
        yield items[first : first + size]


def stacked(items: Sequence[Item]) -> Tensor:
    """The tokens of items as (n, L): what fills up stands behind the answers, which do not see it."""
    width = max(len(item.tokens) for item in items)
    return torch.stack([torch.nn.functional.pad(item.tokens, (0, width - len(item.tokens))) for item in items])


@part("recall")
def measure_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: Tensor,
    tasks: list[str],
    lengths: list[int],
    count: int,
    seed: int = 0,
) -> list[Recall]:
    """Of each task (`TASKS`) and length: how many of the answers are right, and how likely they are; by depth too."""
    records = []
    for task in tasks:
        for length in lengths:
            items = TASKS[task](tokenizer, text, length, count, seed)
            scores = answered(model, items)
            every = [score for one in scores for score in one]
            records.append(
                Recall(
                    task=task,
                    length=length,
                    answers=len(every),
                    accuracy=sum(right for right, _ in every) / len(every),
                    logprob=sum(logprob for _, logprob in every) / len(every),
                    depths=[item.depth for item in items if item.depth is not None],
                    right=[one[0][0] for item, one in zip(items, scores, strict=True) if item.depth is not None],
                )
            )
    return records


def _plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]
