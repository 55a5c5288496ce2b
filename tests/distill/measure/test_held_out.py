"""Held-out quality against its definitions written out."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from transpoint.distill.data.corpus import Corpus
from transpoint.distill.data.packed import PackedDataset
from transpoint.distill.data.sources import DataError
from transpoint.distill.measure import held_out
from transpoint.distill.measure.answers import answer
from transpoint.distill.measure.held_out import HeldOut
from transpoint.students import StudentConfig, build_student
from transpoint.teachers.random import random_teacher

TEXTS = ["A first text, in ASCII.", "x", "Another that is longer.", "the end of all this, if it ends at all"]
LENGTH = 32


@pytest.fixture(scope="module")
def teacher_and_tokenizer():
    teacher, tokenizer = random_teacher("random-llama")
    return teacher.requires_grad_(False), tokenizer


@pytest.fixture(scope="module")
def teacher(teacher_and_tokenizer):
    return teacher_and_tokenizer[0]


@pytest.fixture(scope="module")
def tokenizer(teacher_and_tokenizer):
    return teacher_and_tokenizer[1]


@pytest.fixture(scope="module")
def student(teacher):
    return build_student(teacher, StudentConfig(keep_attention=[0, 2]))


@pytest.fixture(scope="module")
def dataset(tokenizer):
    pieces = [tokenizer(text)["input_ids"] for text in TEXTS]
    starts = [sum(map(len, pieces[:i])) for i in range(len(pieces))]
    return PackedDataset(Corpus(torch.tensor(sum(pieces, [])), torch.tensor(starts), ""), LENGTH)


def naive(dataset, sequences, model, teacher=None, width=None, late=0):
    """Every document of every window on its own, from whole logits, in float64."""
    nll = kl = late_kl = same = 0.0
    predicted = tokens = late_tokens = count = 0
    for i in range(min(sequences, len(dataset))):
        ids, positions = dataset[i]["input_ids"], dataset[i]["position_ids"]
        starts = [*(positions == 0).nonzero().flatten().tolist(), LENGTH]
        for a, b in zip(starts, starts[1:], strict=False):
            logits = model(ids[None, a:b], use_cache=False).logits[0].double()
            nll += nn.functional.cross_entropy(logits[:-1], ids[a + 1 : b], reduction="sum").item() if b - a > 1 else 0
            predicted += b - a - 1
            count += b - a - 1  # ASCII, a token a byte
            if teacher is not None:
                reference = teacher(ids[None, a:b], use_cache=False).logits[0].double()[:, :width].log_softmax(-1)
                found = logits[:, :width].log_softmax(-1)
                by_token = (reference.exp() * (reference - found)).sum(-1)
                kl += by_token.sum().item()
                late_kl += by_token[late:].sum().item()
                late_tokens += max(0, b - a - late)
                same += (reference.argmax(-1) == found.argmax(-1)).sum().item()
                tokens += b - a
    return {
        "tokens": predicted,
        "perplexity": math.exp(nll / predicted),
        "bits_per_byte": nll / math.log(2) / count,
        "kl": kl / tokens if tokens else None,
        "same_top": same / tokens if tokens else None,
        **({"late_kl": late_kl / late_tokens if late_tokens else None} if late else {}),
    }


def check(found, expected):
    for key, value in expected.items():
        assert getattr(found, key) == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), key


def test_a_window_holds_several_documents(dataset):
    positions = torch.stack([item["position_ids"] for item in dataset])
    assert len(dataset) == 2 and (positions == 0).sum(1).min() > 1


@pytest.mark.parametrize("sequences", [1, 2, 99])
def test_quality_is_that_of_each_document_on_its_own(sequences, dataset, student, teacher, tokenizer):
    found = HeldOut(dataset, sequences, tokenizer, teacher).measure(student)
    check(found, naive(dataset, sequences, student, teacher))
    assert found.kl > 0.1 and 0 < found.same_top < 1


@pytest.mark.parametrize("chunk", [1, 5, 1000])
@pytest.mark.parametrize("late", [1, 5, 20, LENGTH])
def test_late_tokens_are_those_after_the_first_of_their_document(
    late, chunk, dataset, student, teacher, tokenizer, monkeypatch
):
    monkeypatch.setattr(held_out, "CHUNK", chunk)
    found = HeldOut(dataset, 2, tokenizer, teacher).measure(student, late)
    check(found, naive(dataset, 2, student, teacher, late=late))
    assert found.late == late and (found.late_kl is None) == (late == LENGTH)


@pytest.mark.parametrize(
    "alike, batch, lengths",
    [
        (0.0, 8192, [[23, 17, 15, 8, 1]]),
        (0.0, 2 * LENGTH, [[23, 17], [15, 8, 1]]),
        (0.7, 8192, [[23, 17], [15], [8], [1]]),
        (0.0, 1, [[23], [17], [15], [8], [1]]),
    ],
)
def test_documents_that_go_together_do_not_see_each_other(
    alike, batch, lengths, dataset, student, teacher, tokenizer, monkeypatch
):
    monkeypatch.setattr(held_out, "ALIKE", alike)
    monkeypatch.setattr(held_out, "BATCH", batch)
    measured = HeldOut(dataset, 2, tokenizer, teacher)
    assert [batch.lengths for batch in measured.batches] == lengths
    check(measured.measure(student, 5), naive(dataset, 2, student, teacher, late=5))


def test_without_a_teacher_there_is_no_kl(dataset, student, tokenizer):
    found = HeldOut(dataset, 2, tokenizer).measure(student)
    check(found, naive(dataset, 2, student))
    assert found.kl is None and found.same_top is None


def test_the_teacher_follows_itself(dataset, teacher, tokenizer):
    held_out = HeldOut(dataset, 2, tokenizer, teacher)
    for model in (teacher, copy.deepcopy(teacher)):
        found = held_out.measure(model)
        assert found.kl == pytest.approx(0, abs=1e-6) and found.same_top == 1
        check(found, naive(dataset, 2, teacher, teacher))


@pytest.mark.parametrize("chunk", [1, 7, 31, 32, 1000])
def test_chunks_do_not_matter(chunk, dataset, student, teacher, tokenizer, monkeypatch):
    monkeypatch.setattr(held_out, "CHUNK", chunk)
    check(HeldOut(dataset, 2, tokenizer, teacher).measure(student), naive(dataset, 2, student, teacher))


@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_vocabularies_padded_differently(padded, dataset, student, teacher, tokenizer):
    """The KL is over the tokens that both have; the padding counts in the model's own perplexity alone."""
    models = {"student": student, "teacher": teacher}
    size = teacher.config.vocab_size
    models[padded] = copy.deepcopy(models[padded])
    models[padded].resize_token_embeddings(size + 13, mean_resizing=False)
    with torch.no_grad():
        models[padded].get_output_embeddings().weight[size:] = 0.5  # enough to matter, were they counted
    found = HeldOut(dataset, 2, tokenizer, models["teacher"]).measure(models["student"])
    check(found, naive(dataset, 2, models["student"], models["teacher"], size))
    plain = HeldOut(dataset, 2, tokenizer, teacher).measure(student)
    assert found.kl == pytest.approx(plain.kl, rel=1e-4)
    assert (found.perplexity > 1.001 * plain.perplexity) == (padded == "student")


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_as_it_was(training, dataset, student, tokenizer):
    student.train(training)
    HeldOut(dataset, 1, tokenizer).measure(student)
    assert student.training == training
    student.eval()


def test_what_a_family_does_to_its_logits_counts(dataset, tokenizer):
    """Granite divides them, outside of its head."""
    sizes = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = AutoConfig.for_model("granite", **sizes, initializer_range=0.15, logits_scaling=4.0)
    models = [AutoModelForCausalLM.from_config(config).eval() for _ in range(2)]
    found = HeldOut(dataset, 2, tokenizer, models[0]).measure(models[1])
    with torch.no_grad():
        expected = naive(dataset, 2, models[1], models[0])
    check(found, expected)


def test_bytes_are_those_of_the_text(teacher, tokenizer):
    """Characters of several bytes count as such."""
    ids = tokenizer("Où est 京都 ? Là-bas, dit-elle !")["input_ids"]
    dataset = PackedDataset(Corpus(torch.tensor(ids), torch.tensor([0]), ""), len(ids))
    found = HeldOut(dataset, 1, tokenizer).measure(teacher)
    count = len("Où est 京都 ? Là-bas, dit-elle !".encode()) - 1  # the first byte is not predicted
    assert found.bits_per_byte == pytest.approx(math.log2(found.perplexity) * found.tokens / count, rel=1e-4)
    assert found.tokens == count  # a token a byte here


# Answers


@pytest.mark.parametrize("chat", [True, False])
def test_answers_are_greedy_and_do_not_repeat_the_question(chat, student, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    prompt = "What?"
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" if chat else prompt
    if not chat:
        tokenizer.chat_template = None
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    for _ in range(12):
        best = student(ids, use_cache=False).logits[0, -1].argmax()
        if best == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, best.view(1, 1)], dim=1)
    expected = tokenizer.decode(ids[0, len(tokenizer(text)["input_ids"]) :], skip_special_tokens=True).strip()
    assert answer(student, tokenizer, prompt, 12) == expected
    assert len(ids[0]) > len(tokenizer(text)["input_ids"])


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 5.0, "min_new_tokens": 12},
        {"num_beams": 3},
        {"do_sample": True, "temperature": 9.0},
        {"return_dict_in_generate": True},
        {"suppress_tokens": [97, 98, 99], "max_length": 5},
    ],
)
def test_answers_are_greedy_whatever_the_model_came_with(settings, student, tokenizer):
    plain = answer(student, tokenizer, "What is it?", 12)
    model = copy.deepcopy(student)
    model.generation_config.update(**settings)
    own = model.generation_config.to_dict()
    assert answer(model, tokenizer, "What is it?", 12) == plain != ""
    assert model.generation_config.to_dict() == own


@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_with_a_token_that_the_model_lacks_is_named(chat, student, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if not chat:
        tokenizer.chat_template = None
    with pytest.raises(DataError, match="^prompt 'What<pad>[?]': the text holds the token '<pad>' of number 259"):
        answer(student, tokenizer, "What<pad>?")
