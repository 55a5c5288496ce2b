"""Recipes: what is refused, in which words, before anything loads; files upon files, overrides, paths."""

import dataclasses
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings, strategies as st

import transpoint.distill.stages.session
import transpoint.teachers
from run_files import CONFIGS
from transpoint.distill import cli
from transpoint.distill.config import ConfigError, Recipe, describe_keys, load_recipe
from transpoint.distill.data.sources import resolve
from transpoint.distill.shipped import shipped

TINY = CONFIGS / "tiny.yaml"
SECTIONS = [entry.name for entry in dataclasses.fields(Recipe.schema())]
KEYS = [key for key, _, _ in describe_keys()]
PARTS = [key.split(".") for key in KEYS]
NESTED = sorted({".".join(parts[:n]) for parts in PARTS for n in range(2, len(parts))})  # sections within sections
KEEP = "expected a list of layer indices, 'every:N' with N of at least 2, a fraction from 0 to 1, or 'select:K'"


def message(path, *overrides):
    """The text of the ConfigError that load_recipe raises; one line."""
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


REFUSED = {
    # keys
    "align.step=3": "unknown key 'align.step' (value 3); did you mean 'align.steps'?",
    "aling={lr: 1}": "unknown key 'aling' (value {'lr': 1}); did you mean 'align'?",
    "distill.teacher_rl=0.1": "unknown key 'distill.teacher_rl' (value 0.1); did you mean 'distill.teacher_lr'?",
    "distill.teacher={lr: 1}": "unknown key 'distill.teacher' (value {'lr': 1}); did you mean 'distill.teacher_lr'?",
    "align={stepz: 4}": "unknown key 'align.stepz' (value 4); did you mean 'align.steps'?",
    "zzz=1": f"unknown key 'zzz' (value 1); expected one of {', '.join(SECTIONS)}",
    "run.qqqqqqqqqqqq=1": "unknown key 'run.qqqqqqqqqqqq' (value 1); "
    "expected one of dir, seed, device, precision, compile, reuse, trackers",
    "align.steps.x=3": "align.steps is {'x': 3}; expected a whole number",
    # the form of an override
    "align.steps": "'align.steps' is no override; expected key=value, as in align.steps=100",
    "=3": "'=3' is no override; expected key=value, as in align.steps=100",
    "": "'' is no override; expected key=value, as in align.steps=100",
    # a section given a value
    "run=3": "run is 3; expected a section with keys of its own",
    "align=": "align is None; expected a section with keys of its own",
    "data=[a]": "data is ['a']; expected a section with keys of its own",
    # types
    "align.steps=abc": "align.steps is 'abc'; expected a whole number",
    "align.steps=1.5": "align.steps is 1.5; expected a whole number",
    "align.steps=true": "align.steps is True; expected a whole number",
    "align.steps=": "align.steps is None; expected a whole number",
    "align.steps=[1]": "align.steps is [1]; expected a whole number",
    "align.lr=fast": "align.lr is 'fast'; expected a number",
    "align.lr=true": "align.lr is True; expected a number",
    "align.lr=null": "align.lr is None; expected a number",
    "align.micro_batch_size=x": "align.micro_batch_size is 'x'; expected a whole number or null",
    "teacher.trust_remote_code=maybe": "teacher.trust_remote_code is 'maybe'; expected true or false",
    "teacher.trust_remote_code=null": "teacher.trust_remote_code is None; expected true or false",
    "teacher.source=null": "teacher.source is None; expected text",
    "run.dir={a: 1}": "run.dir is {'a': 1}; expected text",
    "align.betas=0.9": "align.betas is 0.9; expected a list, each item a number",
    "align.betas=null": "align.betas is None; expected a list, each item a number",
    "align.betas=[0.9,x]": "align.betas[1] is 'x'; expected a list, each item a number",
    "data.train=abc": "data.train is 'abc'; expected a list, each item text",
    "data.train=[a,null]": "data.train[1] is None; expected a list, each item text",
    "data.train=[[a]]": "data.train holds ['a']; expected a list, each item text",
    "evaluate.prompts=[{q: a}]": "evaluate.prompts holds {'q': 'a'}; expected a list, each item text",
    # limits
    "run.seed=-1": "run.seed is -1; expected at least 0",
    "align.steps=-1": "align.steps is -1; expected at least 0",
    "data.length=1": "data.length is 1; expected at least 2",
    "align.micro_batch_size=0": "align.micro_batch_size is 0; expected at least 1",
    "data.max_train_tokens=0": "data.max_train_tokens is 0; expected at least 1",
    "align.warmup=1.5": "align.warmup is 1.5; expected at most 1",
    "align.lr=0": "align.lr is 0.0; expected more than 0",
    "distill.temperature=-1": "distill.temperature is -1.0; expected more than 0",
    "align.lr=.nan": "align.lr is nan; expected more than 0",
    "align.warmup=.nan": "align.warmup is nan; expected at least 0",
    "align.lr=.inf": "align.lr is inf; expected a finite number",
    "distill.clip=.inf": "distill.clip is inf; expected a finite number",
    "align.betas=[0.9]": "align.betas is [0.9]; expected 2 numbers",
    "align.betas=[0.9,2]": "align.betas is 2.0; expected at most 1",
    # choices
    "export.format=nativ": "export.format is 'nativ'; expected one of native, custom, gguf; did you mean 'native'?",
    "run.device=tpu": "run.device is 'tpu'; expected one of auto, cpu, cuda; did you mean 'cpu'?",
    "teacher.dtype=int8": "teacher.dtype is 'int8'; expected one of float32, bfloat16, float16",
    "calibrate.decay=none": "calibrate.decay is 'none'; expected one of fit, lookback",
    # the student's own
    "student.conv_kernel=5": "student.conv_kernel is 5; expected 1 to 4",
    "student.conv_kernel=0": "student.conv_kernel is 0; expected 1 to 4",
    "student.conv_activation=relu": "student.conv_activation is 'relu'; expected silu, null or auto",
    "distill.sample_schedules=mamba": "distill.sample_schedules is 'mamba'; expected a list, each item of its type",
    "distill.anneal=0.5": "distill.anneal is 0.5; expected a section with keys of its own",
    "student.keep_attention=evry:2": f"student.keep_attention is 'evry:2'; {KEEP}",
    "student.keep_attention=every:1": f"student.keep_attention is 'every:1'; {KEEP}",
    "student.keep_attention=every:x": f"student.keep_attention is 'every:x'; {KEEP}",
    "student.keep_attention=1.5": f"student.keep_attention is 1.5; {KEEP}",
    "student.keep_attention=-0.1": f"student.keep_attention is -0.1; {KEEP}",
    "student.keep_attention=.nan": f"student.keep_attention is nan; {KEEP}",
    "student.keep_attention=true": f"student.keep_attention is True; {KEEP}",
    "student.keep_attention=[0,a]": f"student.keep_attention holds 'a'; {KEEP}",
    "student.keep_attention=[1.0]": f"student.keep_attention holds 1.0; {KEEP}",
    "student.keep_attention=[true]": f"student.keep_attention holds True; {KEEP}",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_is_refused_and_how(override):
    assert message(TINY, override) == REFUSED[override]


@pytest.mark.parametrize("source", ["random-llama", "smollm2-135m", "./folder", "model.gguf"])
def test_only_a_teacher_from_the_hub_has_revisions(source):
    with pytest.raises(ConfigError) as caught:
        load_recipe(TINY, [f"teacher.source={source}", "teacher.revision=v1"])
    assert str(caught.value) == (
        f"teacher.revision is 'v1'; expected null: teacher.source '{source}' is not from the hub"
    )
    assert load_recipe(TINY, ["teacher.source=owner/name", "teacher.revision=12"]).teacher.revision == "12"


@pytest.mark.parametrize("override", [o for o in REFUSED if "." in o.partition("=")[0] and "=" in o])
def test_a_file_is_refused_as_an_override_is(override, tmp_path):
    key, _, value = override.partition("=")
    nested = yaml.safe_load(value) if value else None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    assert message(write(tmp_path / "a.yaml", yaml.safe_dump(nested))) == REFUSED[override]


def test_an_unknown_mixer_names_those_there_are():
    assert message(TINY, "student.mixer=mamba3").startswith("student.mixer is 'mamba3'; expected one of mamba2")


def test_an_override_that_is_no_yaml():
    assert message(TINY, "align.steps=[").startswith("align.steps: '[' is not a YAML value (while parsing a flow node")
    assert message(TINY, "run.dir=\udcff").endswith("is not a YAML value (it is no Unicode text)")


@pytest.mark.parametrize("value", ["every:2", "every:3", 0, 1, 0.5, 0.6667, [], [0], [0, -1], [3, 1]])
def test_forms_of_keep_attention(value):
    assert load_recipe(TINY, [f"student.keep_attention={value}"]).student.keep_attention == value


@st.composite
def misspelt_keys(draw):
    """A valid key with one letter dropped, doubled, replaced or swapped in one of its parts."""
    parts = draw(st.sampled_from([*KEYS, *SECTIONS])).split(".")
    part = draw(st.integers(0, len(parts) - 1))
    word = parts[part]
    i = draw(st.integers(0, len(word) - 1))
    letter = draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    kind = draw(st.sampled_from(["drop", "insert", "replace", "swap"]))
    if kind == "drop":
        word = word[:i] + word[i + 1 :]
    elif kind == "insert":
        word = word[:i] + letter + word[i:]
    elif kind == "replace":
        word = word[:i] + letter + word[i + 1 :]
    else:
        word = word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :]
    assume(word)
    parts[part] = word
    key = ".".join(parts)
    assume(key not in (*KEYS, *SECTIONS, *NESTED, "defaults"))
    return key


@settings(max_examples=50, deadline=None)
@given(misspelt_keys())
def test_any_misspelt_key_is_refused_and_a_valid_one_is_named(key):
    told = message(TINY, f"{key}=1")
    assert told.startswith("unknown key '") and "(value " in told
    hint = told.rpartition("; ")[2]
    if hint.startswith("did you mean '"):
        assert hint.removeprefix("did you mean '").removesuffix("'?") in [*KEYS, *SECTIONS, *NESTED]
    else:
        listed = hint.removeprefix("expected one of ").split(", ")
        within = [[k.removeprefix(s + ".") for k in KEYS if k.startswith(s + ".")] for s in (*SECTIONS, *NESTED)]
        names = [SECTIONS] + [list(dict.fromkeys(k.partition(".")[0] for k in part)) for part in within]
        assert listed in names


# Files


def test_files_that_cannot_be_read(tmp_path):
    write(tmp_path / "tiny.yaml", "run: {seed: 1}")
    near = tmp_path / "tini.yaml"
    assert message(near) == f"no config file '{near}'; did you mean '{tmp_path / 'tiny.yaml'}'?"
    assert message(tmp_path / "zzzzzz") == f"no config file '{tmp_path / 'zzzzzz'}'"
    assert message(tmp_path) == f"no config file '{tmp_path}'"
    broken = write(tmp_path / "broken.yaml", "run: {seed: 1\nalign: [")
    assert message(broken).startswith(f"{broken} is not readable as YAML: ")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00run")
    assert message(tmp_path / "binary.yaml").startswith(f"{tmp_path / 'binary.yaml'} is not readable as YAML: ")
    for text, kind in (("- a\n- b", "list"), ("just words", "str"), ("3", "int")):
        path = write(tmp_path / "other.yaml", text)
        assert message(path) == f"{path} holds a {kind}; expected keys and values"


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "{}"])
def test_an_empty_file_is_the_defaults(text, tmp_path):
    assert load_recipe(write(tmp_path / "a.yaml", text)) == Recipe()


def test_defaults_are_read_in_order_and_overrides_come_last(tmp_path):
    write(tmp_path / "parts" / "low.yaml", "align: {steps: 1, lr: 0.1, clip: 1.0}\nrun: {seed: 1}")
    write(tmp_path / "parts" / "middle.yaml", "defaults: [low.yaml]\nalign: {lr: 0.2}\ndistill: {steps: 2}")
    write(tmp_path / "parts" / "high.yaml", "align: {clip: 3.0}\ndistill: {steps: 3}")
    top = write(
        tmp_path / "top.yaml", "defaults: [parts/middle.yaml, parts/high.yaml]\nrun: {seed: 4}\nalign: {betas: [0, 0]}"
    )
    recipe = load_recipe(top, ["run.seed=5", "distill={lr: 0.5}", "run.seed=6"])
    align = recipe.align
    assert (align.steps, align.lr, align.clip, align.betas) == (1, 0.2, 3.0, [0.0, 0.0])
    assert (recipe.distill.steps, recipe.distill.lr, recipe.run.seed) == (3, 0.5, 6)
    assert load_recipe(top).run.seed == 4


def test_a_section_in_two_overrides_is_merged():
    recipe = load_recipe(TINY, ["align={steps: 7}", "align={lr: 0.5}"])
    assert (recipe.align.steps, recipe.align.lr, recipe.align.batch_size) == (7, 0.5, 4)


def test_defaults_that_cannot_be_used(tmp_path):
    one = write(tmp_path / "one.yaml", "defaults: [two.yaml]")
    two = write(tmp_path / "two.yaml", "defaults: [one.yaml]")
    assert message(one) == f"{one}: its defaults lead back to itself"
    assert message(two) == f"{two}: its defaults lead back to itself"
    own = write(tmp_path / "own.yaml", "defaults: [own.yaml]")
    assert message(own) == f"{own}: its defaults lead back to itself"
    text = write(tmp_path / "text.yaml", "defaults: one.yaml")
    assert message(text) == f"{text}: defaults is 'one.yaml'; expected a list of files"
    numbers = write(tmp_path / "numbers.yaml", "defaults: [1]")
    assert message(numbers) == f"{numbers}: defaults is [1]; expected a list of files"
    gone = write(tmp_path / "gone.yaml", "defaults: [tow.yaml]")
    assert message(gone) == f"no config file '{tmp_path / 'tow.yaml'}'; did you mean '{two}'?"
    bad = write(tmp_path / "bad.yaml", "run: {sead: 1}")
    above = write(tmp_path / "above.yaml", f"defaults: [{bad.name}]")
    assert message(above) == "unknown key 'run.sead' (value 1); did you mean 'run.seed'?"


def test_a_file_used_twice_is_no_cycle(tmp_path):
    write(tmp_path / "base.yaml", "run: {seed: 9}")
    write(tmp_path / "left.yaml", "defaults: [base.yaml]")
    write(tmp_path / "right.yaml", "defaults: [base.yaml]")
    assert load_recipe(write(tmp_path / "top.yaml", "defaults: [left.yaml, right.yaml]")).run.seed == 9


def test_paths_in_a_file_are_beside_it_and_those_on_the_command_line_are_not(tmp_path, monkeypatch):
    write(tmp_path / "conf" / "text" / "a.txt", "a")
    write(tmp_path / "conf" / "text" / "b.txt", "b")
    (tmp_path / "conf" / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    path = write(
        tmp_path / "conf" / "r.yaml",
        "teacher: {source: model}\ndata: {train: [text/a.txt, text/*.txt, hub:o/n, gone.txt], heldout: [/x/y.txt]}",
    )
    above = write(tmp_path / "top.yaml", "defaults: [conf/r.yaml]")
    for recipe in (load_recipe(path), load_recipe("conf/r.yaml"), load_recipe(above)):
        folder = str(tmp_path / "conf")
        assert recipe.data.train == [f"{folder}/text/a.txt", f"{folder}/text/*.txt", "hub:o/n", "gone.txt"]
        assert recipe.data.heldout == ["/x/y.txt"] and recipe.teacher.source == f"{folder}/model"
    recipe = load_recipe(path, ["data.train=[text/a.txt]", "teacher.source=model"])
    assert recipe.data.train == ["text/a.txt"] and recipe.teacher.source == "model"


# What a recipe is kept as


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["student.keep_attention=[0, -1]", "student.conv_activation=null", "align.micro_batch_size=2"],
        ["student.keep_attention=0.25", "evaluate.prompts=['Où est « 京都 »?', 'a: b', '#']", "run.dir='123'"],
    ],
)
def test_a_saved_recipe_loads_as_the_same(overrides, tmp_path):
    recipe = load_recipe(TINY, overrides)
    recipe.save(tmp_path / "recipe.yaml")
    recipe.run.dir = os.path.abspath(recipe.run.dir)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_a_saved_recipe_is_the_same_in_another_folder(tmp_path, monkeypatch):
    for name in ("work/texts", "work/other", "work/teacher", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "work" / "texts" / "a.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path / "work")
    own = [
        "data.train=[texts/a.jsonl, 'texts/*.jsonl', 'hub:a/b']",
        "run.reuse=[other, gone]",
        "teacher.source=teacher",
    ]
    own += ["run.dir=runs/one", "distill.teacher_cache=cache", "synthesize.out=out", "data.cache=tokens"]
    load_recipe(TINY, own).save(tmp_path / "saved.yaml")
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe, work = load_recipe(tmp_path / "saved.yaml"), str(tmp_path / "work")
    assert recipe.data.train == [f"{work}/texts/a.jsonl", f"{work}/texts/*.jsonl", "hub:a/b"]
    assert (recipe.run.dir, recipe.run.reuse) == (f"{work}/runs/one", [f"{work}/other", f"{work}/gone"])
    assert (recipe.distill.teacher_cache, recipe.synthesize.out) == (f"{work}/cache", f"{work}/out")
    assert (recipe.teacher.source, recipe.data.cache) == (f"{work}/teacher", f"{work}/tokens")
    load_recipe(TINY, ["teacher.source=random-llama"]).save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml").teacher.source == "random-llama"


# What YAML makes of text


@pytest.mark.parametrize(
    "text, line, key",
    [
        ("align: {steps: 5}\ndata: {length: 64}\nalign: {lr: 0.5}\n", 3, "align"),
        ("align: {steps: 5, lr: 0.5, steps: 7}\n", 1, "steps"),
        ("distill:\n  groups:\n    mlp: {lr: 0}\n    mlp: {lr: 1}\n", 4, "mlp"),
    ],
)
def test_a_key_that_stands_twice_is_refused(text, line, key, tmp_path):
    path = write(tmp_path / "recipe.yaml", text)
    assert f"the key '{key}' stands twice, again in line {line}: remove one of them" in message(path)


def test_a_key_that_stands_twice_in_an_override_is_refused():
    assert "the key 'steps' stands twice" in message(TINY, "align={steps: 5, steps: 7}")


def test_merge_keys_are_yamls_own(tmp_path):
    text = "align: &a {steps: 5, lr: 0.5}\ndistill: {<<: *a, steps: 7, temperature: 2}\n"
    recipe = load_recipe(write(tmp_path / "recipe.yaml", text))
    assert (recipe.align.steps, recipe.distill.steps, recipe.distill.lr) == (5, 7, 0.5)


WRITTEN = ["2024", "yes", "off", "1_000", "012", "1:30", "2024-01-01", "1e3", ".5", "0x10", "True", "1.50", "+1"]
WRITTEN += ["${x}", "${oc.env:HOME}", "a ${b} c", "\\${x}", "???", "$", "{}x", "~x", "a\\"]


@pytest.mark.parametrize("text", WRITTEN)
def test_text_is_as_it_is_written(text, tmp_path):
    quoted = f"'{text}'" if text == "{}x" else text  # YAML's own meaning
    path = write(
        tmp_path / "recipe.yaml", f"evaluate:\n  prompts:\n  - {quoted}\n  - plain\nsynthesize:\n  out: x{text}\n"
    )
    recipe = load_recipe(path, [f"data.text_field={quoted}"] if text != "???" else [])
    assert recipe.evaluate.prompts == [text, "plain"] and recipe.synthesize.out == f"x{text}"
    assert recipe.data.text_field == (text if text != "???" else "text")
    recipe.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml").evaluate.prompts == [text, "plain"]


@settings(max_examples=10)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12), max_size=12))
def test_any_text_comes_back(texts):
    override = yaml.safe_dump(texts, default_flow_style=True, allow_unicode=True, width=10**6).strip()
    assert load_recipe(TINY, [f"evaluate.prompts={override}"]).evaluate.prompts == texts


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.0e-3", "0.001", ".1e-2"])
def test_a_number_is_one_with_and_without_a_point(number, tmp_path):
    path = write(tmp_path / "recipe.yaml", f"align: {{lr: {number}, betas: [0.9, 9e-1]}}\n")
    assert load_recipe(path).align.lr == 0.001 and load_recipe(path).align.betas == [0.9, 0.9]
    assert load_recipe(path, [f"distill.lr={number}"]).distill.lr == 0.001


@pytest.mark.parametrize(
    "text, steps",
    [("012", 12), ("1_000", 1000), ("1e3", 1000), ("+7", 7), ("0x10", None), ("1:30", None), ("1.5", None)],
)
def test_a_whole_number_is_what_a_person_reads(text, steps, tmp_path):
    path = write(tmp_path / "recipe.yaml", f"align: {{steps: {text}}}\n")
    if steps is None:
        assert "expected a whole number" in message(path)
    else:
        assert load_recipe(path).align.steps == load_recipe(TINY, [f"align.steps={text}"]).align.steps == steps


@pytest.mark.parametrize(
    "text, reason",
    [
        ("align: &a {steps: *a}\n", "it holds itself"),
        ("? [a, b]\n: 1\n", "is not readable as YAML"),
        ('evaluate: {prompts: ["a\\0b"]}\n', "holds a NUL character: take it out"),
        ("data: {train: ['']}\n", "'' is no path: leave it out, or name one"),
        ("run: {dir: ~nosuchuser/x}\n", "'~nosuchuser/x' is no path: there is no such user"),
    ],
)
def test_what_is_no_recipe_is_one_line(text, reason, tmp_path):
    assert reason in message(write(tmp_path / "recipe.yaml", text))


def test_a_path_may_be_too_long_to_be_one(tmp_path):
    name = "x" * 5000
    assert load_recipe(TINY, [f"data.train=[{name}]"]).data.train == [name]


# Paths


@pytest.mark.parametrize("name", ["plain", "run [v1]", "a*b", "what?"])
def test_files_beside_a_recipe_are_found_whatever_its_folder_is_called(name, tmp_path, monkeypatch):
    folder = tmp_path / name
    text = "data: {train: [a.jsonl, 'b*.jsonl'], heldout: ['c[1].jsonl']}\nteacher: {source: other}\n"
    path = write(folder / "recipe.yaml", text)
    for file in ("a.jsonl", "b1.jsonl", "c[1].jsonl", "c1.jsonl"):
        (folder / file).write_text('{"text": "x"}\n')
    (folder / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    found = [str(item) for source in recipe.data.train + recipe.data.heldout for item in resolve(source)]
    assert found == [str(folder / file) for file in ("a.jsonl", "b1.jsonl", "c[1].jsonl")]
    assert recipe.teacher.source == str(folder / "other")


def test_the_home_folder_is_meant_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ["run.dir", "data.cache", "distill.teacher_cache", "synthesize.out", "teacher.source"]
    lists = ["run.reuse", "data.train", "data.heldout", "synthesize.prompts"]
    recipe = load_recipe(TINY, [f"{key}=~/x" for key in keys] + [f"{key}=['~/x']" for key in lists])
    for key in keys + lists:
        value = recipe
        for part in key.split("."):
            value = getattr(value, part)
        assert value in (f"{tmp_path}/x", [f"{tmp_path}/x"]), key
    assert load_recipe(TINY, ["evaluate.prompts=['~/x']"]).evaluate.prompts == ["~/x"]


def test_every_key_is_documented():
    described = {key: (default, help) for key, default, help in describe_keys()}
    assert len(described) == len(describe_keys())

    def flatten(value, key):
        if not isinstance(value, dict) or not value:
            return {key: value}
        return {k: v for name, part in value.items() for k, v in flatten(part, f"{key}.{name}".lstrip(".")).items()}

    flat = flatten(Recipe().to_dict(), "")
    assert list(described) == list(flat)
    for key, (default, help) in described.items():
        assert len(help) > 5, key
        assert default == ("null" if flat[key] is None else str(flat[key]))


@pytest.mark.parametrize("path", shipped().values(), ids=lambda p: p.name)
def test_the_recipes_that_ship_load(path):
    recipe = load_recipe(path)
    for source in (*recipe.data.train, *recipe.data.heldout):
        if "sample/" in source:  # it ships beside them
            assert os.path.isabs(source) and Path(source).is_file()


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("override", ["align.step=3", "align.lr=fast", "export.format=nativ", "run.seed=-1"])
def test_nothing_is_loaded_when_the_recipe_is_wrong(command, override, tmp_path, monkeypatch, capsys):
    def load_teacher(*args, **kwargs):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(transpoint.distill.models, "load_teacher", load_teacher)
    monkeypatch.setattr(transpoint.teachers, "load_teacher", load_teacher)
    monkeypatch.setattr(transpoint.distill.stages.session, "tokenize_corpus", load_teacher)
    assert cli.main([command, str(TINY), f"run.dir={tmp_path / 'run'}", override]) == 1
    assert capsys.readouterr().err == f"transpoint: error: {REFUSED[override]}\n"
    assert not (tmp_path / "run").exists()
