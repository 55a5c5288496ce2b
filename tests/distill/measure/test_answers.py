"""Answers scored by exact match: that padding changes nothing, what counts as right, and what is no question."""

import copy
import json
from pathlib import Path

import pytest
import zstandard

from transpoint.distill.data.sources import DataError
from transpoint.distill.measure.answers import EXAMPLES, Question, answer, exact_match, normalised, read_questions
from transpoint.students import StudentConfig, build_student
from transpoint.teachers.random import random_teacher

SAMPLE = Path(__file__).parents[3] / "configs/sample/questions.jsonl"
ROW = {"question": "What is 1 plus 1?", "answers": ["2", "two"]}


@pytest.fixture(scope="module")
def loaded():
    teacher, tokenizer = random_teacher("random-llama")
    return teacher.requires_grad_(False), tokenizer


@pytest.fixture(scope="module")
def questions():
    return read_questions(str(SAMPLE))[: EXAMPLES + 7]


@pytest.fixture
def write(tmp_path):
    def written(*lines):
        path = tmp_path / "asked.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return str(path)

    return written


def model_of(kind, teacher):
    if kind == "teacher":
        return teacher
    return build_student(teacher, StudentConfig(mixer=kind, keep_attention=[1])).requires_grad_(False)


@pytest.mark.stack
@pytest.mark.parametrize("kind", ["teacher", "mamba2", "transmamba"])
def test_a_batch_gives_what_each_gives_alone(kind, loaded, questions):
    model, tokenizer = model_of(kind, loaded[0]), loaded[1]
    alone = exact_match(model, tokenizer, questions, batch_size=1)
    assert exact_match(model, tokenizer, questions, batch_size=4) == alone
    assert [given.question for given in alone] == [question.question for question in questions[EXAMPLES:]]
    assert len({given.answer for given in alone}) > 1  # else it would not show if rows were mixed up


def test_a_prompt_is_examples_and_a_question_in_plain_text(loaded, questions):
    teacher, tokenizer = loaded[0], copy.deepcopy(loaded[1])
    given = exact_match(teacher, tokenizer, questions[: EXAMPLES + 1])
    tokenizer.chat_template = None
    one, two, three, asked = questions[: EXAMPLES + 1]
    prompt = (
        f"Question: {one.question}\nAnswer: {one.answers[0]}\n\n"
        f"Question: {two.question}\nAnswer: {two.answers[0]}\n\n"
        f"Question: {three.question}\nAnswer: {three.answers[0]}\n\n"
        f"Question: {asked.question}\nAnswer:"
    )
    (found,) = given
    assert found.answer == answer(teacher, tokenizer, prompt, 16).partition("\n")[0].strip() != ""


def test_right_is_any_accepted_answer(loaded, questions):
    examples, asked = questions[:EXAMPLES], questions[EXAMPLES:]
    answers = [given.answer for given in exact_match(*loaded, questions)]
    assert all(map(normalised, answers))
    key = [Question(one.question, ["another", f"The {own.upper()}!"]) for one, own in zip(asked, answers, strict=True)]
    key[2] = Question(key[2].question, ["another"])
    given = exact_match(*loaded, examples + key)
    assert [one.right for one in given] == [i != 2 for i in range(len(key))]
    assert [one.answer for one in given] == answers


def test_an_answer_is_one_line(loaded, questions, monkeypatch):
    tokenizer = loaded[1]
    texts = iter([" Madrid\nQuestion: more", "\n Madrid", " madrid.<|im_end|>", ""])
    monkeypatch.setattr("transpoint.distill.measure.answers.decoded", lambda *_: next(texts).removesuffix("<|im_end|>"))
    madrid = Question("What is the capital of Spain?", ["Madrid"])
    given = exact_match(loaded[0], tokenizer, [*questions[:EXAMPLES], *[madrid] * 4])
    assert [(one.answer, one.right) for one in given] == [("Madrid", True), ("", False), ("madrid.", True), ("", False)]


@pytest.mark.parametrize(
    "tokens", [{"pad_token": None}, {"pad_token": "<pad>"}, {"pad_token": None, "eos_token": None}]
)
def test_tokenizers_without_padding(tokens, loaded, questions):
    teacher, tokenizer = loaded[0], copy.deepcopy(loaded[1])
    expected = exact_match(teacher, tokenizer, questions)
    if tokens["pad_token"]:
        tokenizer.add_special_tokens(tokens)  # one that the model has no embedding for
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    before = tokenizer.special_tokens_map, tokenizer.padding_side
    assert exact_match(teacher, tokenizer, questions) == expected
    assert (tokenizer.special_tokens_map, tokenizer.padding_side) == before


def test_a_question_with_a_token_that_the_model_lacks_is_named(loaded, questions):
    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    asked = Question("What is <pad>?", ["nothing"])
    with pytest.raises(DataError, match="^question 'What is <pad>[?]': the text holds the token '<pad>' of number 259"):
        exact_match(loaded[0], tokenizer, [*questions[:EXAMPLES], asked])


def test_a_model_in_training_stays_so(loaded, questions):
    model = copy.deepcopy(loaded[0]).train()
    exact_match(model, loaded[1], questions[: EXAMPLES + 1])
    assert model.training


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  Pacific Ocean.", "pacific ocean"),
        ("  a lion,\tan owl and the   cat ", "lion owl and cat"),
        ("Another theory", "another theory"),  # no articles
        ("forty-two", "fortytwo"),
        ("U.S.", "us"),
        ("The.", ""),
    ],
)
def test_normalised(text, expected):
    assert normalised(text) == expected


def test_the_sample():
    questions = read_questions(str(SAMPLE))
    asked = questions[EXAMPLES:]
    assert len(asked) == 60 == len({one.question for one in questions}) - EXAMPLES
    numbers = [one for one in asked if one.answers[0].isdigit()]
    assert len(numbers) == 30
    for one in numbers:
        a, operation, b = one.question.removeprefix("What is ").removesuffix("?").split()
        result = {"plus": int(a) + int(b), "minus": int(a) - int(b), "times": int(a) * int(b)}[operation]
        assert one.answers[0] == str(result)


def test_compressed_and_blank_lines(write, tmp_path):
    path = Path(write(ROW, "", ROW, ROW, {**ROW, "answers": [" 2 "]}, ""))
    questions = read_questions(str(path))
    assert questions == [Question(ROW["question"], ROW["answers"])] * 3 + [Question(ROW["question"], ["2"])]
    compressed = tmp_path / "asked.jsonl.zst"
    compressed.write_bytes(zstandard.compress(path.read_bytes()))
    assert read_questions(str(compressed)) == questions


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "not valid JSON: "),
        ("[]", "not a JSON object"),
        ({"answers": ["2"]}, "no question: expected a text as 'question'"),
        ({**ROW, "question": " "}, "no question: "),
        ({**ROW, "question": "\ud800"}, "no question: "),
        ({"question": "What?"}, "no answers: expected a list of texts as 'answers'"),
        ({**ROW, "answers": "2"}, "no answers: "),
        ({**ROW, "answers": []}, "no answers: "),
        ({**ROW, "answers": ["2", 2]}, "no answers: "),
        ({**ROW, "answers": ["2", "A."]}, "nothing is left of the answer 'A.' without articles and punctuation"),
    ],
)
def test_a_row_that_is_no_question_is_named(row, message, write):
    with pytest.raises(DataError) as caught:
        read_questions(write(ROW, "", ROW, row, ROW, ROW))
    assert str(caught.value).startswith(f"asked.jsonl line 4: {message}") and "\n" not in str(caught.value)


def test_too_few_rows(write):
    path = write(*[ROW] * 3)
    with pytest.raises(DataError, match="asked.jsonl: 3 rows, and the first 3 are examples: give at least 4$"):
        read_questions(path)
