"""What a model answers, and whether that is right."""

import re
import string
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.rows import check_tokens
from ..data.sources import DataError, Skip, place, read, resolve
from ..models import embedding_rows, generated, generating
from ..run.records import Given
from ..run.seconds import part
from ..tokenizers import beginning, decoded

EXAMPLES = 3  # questions that stand before each other one, with their answers


@dataclass(frozen=True)
class Question:
    question: str
    answers: list[str]  # each of which is right


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, Tensor]:
    """The inputs of a model that is to answer: a chat question where the tokenizer has a template, else a text."""
    if not tokenizer.chat_template:
        return cast("dict[str, Tensor]", tokenizer(prompt, return_tensors="pt"))
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return cast("dict[str, Tensor]", inputs)


@part("answers")
@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 64) -> str:
    """The model's greedy answer: to a chat question where the tokenizer has a template, else a continuation.

    Raises DataError for a prompt with a token that the model has no embedding for.
    """
    inputs = prompt_tokens(tokenizer, prompt)
    check_tokens(inputs["input_ids"], embedding_rows(model), tokenizer, f"prompt {prompt!r}")
    inputs = {key: inputs[key].to(model.device) for key in ("input_ids", "attention_mask")}
    with generating(model, max_new_tokens=max_new_tokens, do_sample=False):
        output = generated(model, **inputs)
    return decoded(tokenizer, output[0, inputs["input_ids"].shape[1] :]).strip()


def read_questions(source: str) -> list[Question]:
    """Rows {"question": str, "answers": [str]} of a file or folder: see `data.sources`.

    Raises DataError for a row that is no question, and where only examples are there.
    """
    questions = []
    for item in resolve(source):
        for number, row in read(item, ("question", "answers")):
            questions.append(_read(row, place(item, number)))
    if len(questions) <= EXAMPLES:
        raise DataError(
            f"{source}: {len(questions)} rows, and the first {EXAMPLES} are examples: give at least {EXAMPLES + 1}"
        )
    return questions


@part("answers")
@torch.no_grad()
def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Question],
    batch_size: int = 16,
    max_new_tokens: int = 16,
) -> list[Given]:
    """The first line of the model's greedy answer to each question but the examples, which stand before each, answered.

    It is right if it is an accepted answer: both as `normalised` has them. All is plain text, whatever chat template
    there is.

    Raises DataError for a question with a token that the model has no embedding for.
    """
    examples, asked = questions[:EXAMPLES], questions[EXAMPLES:]
    shots = "".join(f"{_asked(example)} {example.answers[0]}\n\n" for example in examples)
    begin, rows = beginning(tokenizer), embedding_rows(model)
    training, found = model.training, []
    model.eval()
    for first in range(0, len(asked), batch_size):
        batch = asked[first : first + batch_size]
        prompts = tokenizer([shots + _asked(one) for one in batch], add_special_tokens=False)["input_ids"]
        prompts = [begin + ids for ids in cast("list[list[int]]", prompts)]
        for one, ids in zip(batch, prompts, strict=True):
            check_tokens(ids, rows, tokenizer, f"question {one.question!r}")
        given = _continued(model, tokenizer, prompts, max_new_tokens)
        for one, text in zip(batch, given, strict=True):
            line = text.partition("\n")[0].strip()
            right = normalised(line) in map(normalised, one.answers)
            found.append(Given(one.question, line, right))
    model.train(training)
    return found


def normalised(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: as SQuAD compares answers (arXiv 1606.05250)."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _asked(question: Question) -> str:
    return f"Question: {question.question}\nAnswer:"


def _continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[str]:
    # Padded by hand: many tokenizers have no pad token, and some one that the model has no embedding for.
    fill = next((token for token in (tokenizer.eos_token_id, tokenizer.pad_token_id) if token is not None), 0)
    width = max(map(len, prompts))
    ids = torch.tensor([[fill] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with generating(model, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=fill):
        output = generated(model, input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    return [decoded(tokenizer, row) for row in output[:, width:]]


def _read(row: dict | Skip, where: str) -> Question:
    if isinstance(row, Skip):
        raise DataError(f"{where}: {row.reason}{row.cause}")
    question, answers = row.get("question"), row.get("answers")
    if not _is_text(question):
        raise DataError(f"{where}: no question: expected a text as 'question'")
    if not isinstance(answers, list) or not answers or not all(map(_is_text, answers)):
        raise DataError(f"{where}: no answers: expected a list of texts as 'answers'")
    for one in answers:
        if not normalised(one):
            raise DataError(f"{where}: nothing is left of the answer {one!r} without articles and punctuation")
    return Question(question.strip(), [one.strip() for one in answers])


def _is_text(value: Any) -> TypeGuard[str]:
    # JSON can hold half a surrogate pair, which no tokenizer takes.
    return isinstance(value, str) and bool(value.strip()) and not re.search(r"[\ud800-\udfff]", value)
