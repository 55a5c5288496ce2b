"""Which tokens of chats are an answer's: in documents, in the cache, in packed sequences."""

import json

import pytest
import torch
from hypothesis import given, strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from transpoint.distill.data.corpus import Corpus, tokenize_corpus
from transpoint.distill.data.packed import PackedDataset
from transpoint.distill.data.sources import DataError

TURN = "<|{{ m.role }}|>{{ m.content }}<eos>\n"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
PLAIN = "{% for m in messages %}" + TURN + "{% endfor %}" + PROMPT
# Of earlier answers it leaves out what was thought.
THINKING = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}<|assistant|><think>{{ m.content }}<eos>\n"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + PROMPT
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{% generation %}{{ m.content }}<eos>"
    "{% endgeneration %}{{ '\n' }}{% else %}" + TURN + "{% endif %}{% endfor %}" + PROMPT
)


def make_tokenizer(template=PLAIN, bos=False):
    """A token a character, besides special ones."""
    special = ["<eos>", "<|user|>", "<|assistant|>", "<bos>"]
    vocabulary = {token: i for i, token in enumerate([*special, *map(chr, range(10, 127))])}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model.add_special_tokens(special)
    if bos:
        model.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<eos>", bos_token="<bos>" if bos else None, chat_template=template
    )


def chat(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def marked(tmp_path, rows, tokenizer=None, **options):
    """Documents as text, what is an answer's in brackets; and the corpus."""
    tokenizer = tokenizer or make_tokenizer()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = tokenize_corpus([str(path)], tokenizer, answers=True, **options)
    pieces = [tokenizer.decode([token]) for token in corpus.tokens.tolist()]
    for first, end in corpus.answers.tolist():
        pieces[first] = "[" + pieces[first]
        pieces[end - 1] += "]"
    ends = [*corpus.starts[1:].tolist(), len(pieces)]
    return ["".join(pieces[a:b]) for a, b in zip(corpus.starts.tolist(), ends, strict=True)], corpus


def test_every_turn_of_the_assistant_is_an_answer(tmp_path):
    rows = [{"messages": chat("hi", "yes", "why", "so")}, {"messages": chat("a", "b", "c")}]
    texts, corpus = marked(tmp_path, rows)
    assert texts == [
        "<|user|>hi<eos>\n<|assistant|>[yes<eos>\n]<|user|>why<eos>\n<|assistant|>[so<eos>\n]<eos>",
        "<|user|>a<eos>\n<|assistant|>[b<eos>\n]<|user|>c<eos>\n<eos>",
    ]
    assert corpus.summary() == "2 documents, 36 tokens, 33% of them in 3 answers"


def test_a_template_may_end_chats_with_the_eos(tmp_path):
    """As Phi's do: it stands after the last turn alone."""
    turns = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    ends = make_tokenizer(turns + "{% if add_generation_prompt %}<|assistant|>{% else %}<eos>{% endif %}")
    texts, _ = marked(tmp_path, [{"messages": chat("hi", "yes", "why", "so")}], ends)
    assert texts == ["<|user|>hi\n<|assistant|>[yes\n]<|user|>why\n<|assistant|>[so\n<eos>]"]


def test_completions_are_answers(tmp_path):
    rows = [
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": chat("a", "b", "c"), "completion": chat("x", "d")[1:]},
    ]
    for template in (PLAIN, MARKED):
        texts, _ = marked(tmp_path, rows, make_tokenizer(template, bos=True))
        end = "<eos>\n]<eos>" if template == PLAIN else "<eos>]\n<eos>"
        assert texts[0] == "<bos>1+1=[2<eos>]"
        assert texts[1] == "<|user|>a<eos>\n<|assistant|>b<eos>\n<|user|>c<eos>\n<|assistant|>[d" + end


def test_a_template_may_mark_answers_itself(tmp_path):
    texts, _ = marked(tmp_path, [{"messages": chat("hi", "yes", "why", "so")}], make_tokenizer(MARKED))
    assert texts == ["<|user|>hi<eos>\n<|assistant|>[yes<eos>]\n<|user|>why<eos>\n<|assistant|>[so<eos>]\n<eos>"]


def test_a_token_across_the_beginning_of_an_answer_belongs_to_it(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["=2"])
    assert marked(tmp_path, [{"prompt": "1+1=", "completion": "2,"}], tokenizer)[0] == ["1+1[=2,<eos>]"]


def test_rows_without_an_answer_are_left_out(tmp_path):
    rows = [
        {"messages": chat("hi", "yes"), "text": "as a text it has none"},
        {"text": "plain"},
        {"messages": chat("hi")},
        {"prompt": "hi", "completion": ""},
        {"prompt": "hi", "completion": chat("x", "y")},
        {"other": "x"},
    ]
    texts, corpus = marked(tmp_path, rows)
    assert texts == ["<|user|>hi<eos>\n<|assistant|>[yes<eos>\n]<eos>"]
    assert corpus.skipped == {"no answer": 4, "no text, messages, prompt or completion field": 1}
    with pytest.raises(DataError) as caught:
        marked(tmp_path, rows[1:3])
    assert str(caught.value) == (
        f"no usable document in {tmp_path}/rows.jsonl: skipped 2: 2 no answer (first: rows.jsonl line 1); "
        "give rows of messages, or of prompt and completion, in tune.train"
    )


def test_a_template_that_writes_earlier_turns_otherwise(tmp_path):
    rows = [{"messages": chat("hi", "yes")}, {"messages": chat("hi", "yes", "why", "so")}]
    texts, corpus = marked(tmp_path, rows, make_tokenizer(THINKING))
    assert texts == ["<|user|>hi<eos>\n<|assistant|>[<think>yes<eos>\n]<eos>"]
    reason = "the chat template rewrites earlier turns, and marks no answers by {% generation %}"
    assert corpus.skipped == {reason: 1}


def test_a_prompt_may_begin_what_is_not_kept_of_an_answer(tmp_path):
    """As of models that think: the prompt for an answer opens a thought, and the answer is written without."""
    opens = "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
    turns = "{% for m in messages %}" + TURN + "{% endfor %}"
    texts, _ = marked(tmp_path, [{"messages": chat("hi", "yes", "why", "so")}], make_tokenizer(turns + opens))
    assert texts == ["<|user|>hi<eos>\n<|assistant|>[yes<eos>\n]<|user|>why<eos>\n<|assistant|>[so<eos>\n]<eos>"]


def test_a_greeting_is_no_answer(tmp_path):
    rows = [{"messages": [{"role": "assistant", "content": "welcome"}, *chat("hi", "yes")]}]
    texts, _ = marked(tmp_path, rows)
    assert texts == ["<|assistant|>welcome<eos>\n<|user|>hi<eos>\n<|assistant|>[yes<eos>\n]<eos>"]


def test_answers_are_cached_and_apart_from_plain_text(tmp_path):
    rows = [{"messages": chat("hi", "yes")}, {"messages": chat("a", "b", "c", "d")}]
    cache, tokenizer = tmp_path / "cache", make_tokenizer()
    first, again = (marked(tmp_path, rows, tokenizer, cache=cache)[1] for _ in range(2))
    assert len(list(cache.glob("*.json"))) == 1 and torch.equal(first.answers, again.answers)
    plain = tokenize_corpus([str(tmp_path / "rows.jsonl")], tokenizer, cache=cache)
    assert plain.answers is None and plain.fingerprint != first.fingerprint
    assert torch.equal(plain.tokens, first.tokens)


@given(st.integers(1, 60))
def test_a_token_limit_cuts_answers(tmp_path_factory, limit):
    rows = [{"messages": chat("hi", "yes", "why", "so")}] * 2
    tmp_path = tmp_path_factory.mktemp("cut")
    whole, cut = (marked(tmp_path, rows, max_tokens=most)[1] for most in (None, limit))
    limit = min(limit, len(whole.tokens))
    spans = [(first, min(end, limit)) for first, end in whole.answers.tolist() if first < limit]
    assert cut.answers.tolist() == [list(span) for span in spans] and cut.answers.shape == (len(spans), 2)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), max_size=8), st.integers(1, 15), st.booleans())
def test_windows_have_their_answers(gaps, length, begins):
    spans, total = [], 0
    for gap, size in gaps:
        spans.append((total + gap, total + gap + size))
        total = spans[-1][1]
    total += 15
    inside, begun = torch.zeros(total, dtype=torch.bool), torch.zeros(total, dtype=torch.long)
    for first, end in spans:
        inside[first:end], begun[first:end] = True, first
    answers = torch.tensor(spans, dtype=torch.int64).view(-1, 2)
    begin = [999] if begins else []
    corpus = Corpus(torch.arange(total), torch.tensor([0]), "", answers=answers, begin=begin)
    assert corpus.answered == inside.float().mean()
    packed = PackedDataset(corpus, length)
    for i in range(len(packed)):
        tokens, counts = (packed[i][name].tolist() for name in ("input_ids", "before_answer"))
        own = [token < 999 and bool(inside[token]) and int(begun[token]) >= i * length for token in tokens[1:]]
        assert counts == [*own, False]  # an answer that began before has its question elsewhere


def test_what_comes_next_is_no_answer_in_another_document():
    corpus = Corpus(torch.arange(8), torch.tensor([0, 4]), "", answers=torch.tensor([[2, 8]]))
    assert PackedDataset(corpus, 8)[0]["before_answer"].tolist() == [False, True, True, False, True, True, True, False]


def test_a_batch_says_how_many_tokens_of_answers_it_has():
    corpus = Corpus(torch.arange(40), torch.tensor([0]), "", answers=torch.tensor([[3, 6], [12, 13]]))
    packed = PackedDataset(corpus, 10)
    alone = [packed.batch(0, 4, 0, range(slot, slot + 1))[0] for slot in range(4)]
    assert [item["per_answer"] for item in alone] == [1.0] * 4
    assert sum(int(item["before_answer"].sum()) for item in alone) == 4
    nothing = PackedDataset(Corpus(torch.arange(40), torch.tensor([0]), "", answers=torch.tensor([[0, 1]])), 10)
    assert nothing.batch(0, 4, 0, range(1))[0]["per_answer"] == 4
