"""A mixer, a teacher family, a stage and a format that exist in test files alone go all the way."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from run_files import TINY
from toy_mixer import ToyMixer
from transpoint.distill.cli import main
from transpoint.distill.config import ConfigError, load_recipe
from transpoint.distill.export import export
from transpoint.distill.export.formats import FORMATS, ExportError, Format
from transpoint.distill.settings import setting
from transpoint.distill.stages.inputs import stage_inputs
from transpoint.distill.stages.pipeline import names
from transpoint.distill.stages.runner import run_recipe
from transpoint.distill.stages.stage import Stage
from transpoint.students import MIXERS, HybridForCausalLM, MixerKind, Option, StudentConfig, StudentError, build_student
from transpoint.students.modeling.configuration_hybrid import write_code
from transpoint.teachers import READERS, TeacherError, attention_view
from transpoint.teachers.attention import Projection, Rows, read_attention
from transpoint.teachers.random import byte_tokenizer

START = Option(1.0, "what the mean is multiplied by at first", minimum=0)


# The toys


@pytest.fixture
def toy_mixer(monkeypatch):
    monkeypatch.setitem(MIXERS, "toy", MixerKind("Toy", "Y", ToyMixer, {"start": START}, keep_attention="every:4"))


@pytest.fixture
def toy_family(monkeypatch):
    """Persimmon: queries, keys and values of each head lie one after the other in one matrix."""

    def read(model, index, module, name):
        size, heads = module.head_dim, module.num_heads
        parts = {
            part: Projection("query_key_value", module.query_key_value, Rows(i * size, size, 3 * size, heads))
            for i, part in enumerate(("q_proj", "k_proj", "v_proj"))
        }
        return read_attention(model, index, module, name, **parts, o_proj=Projection("dense", module.dense))

    monkeypatch.setitem(READERS, "persimmon", read)


@dataclasses.dataclass
class ShrinkConfig:
    factor: float = setting(0.5, "what the weights of the mean are multiplied by", above=0)
    say: str = setting("shrunk", "what is said of it", result=False)


def shrink(session, folder):
    settings, student = session.recipe.shrink, session.student_before("shrink")
    with torch.no_grad():
        for mixer in student.mixer_layers():
            if mixer is not None:
                mixer.weight *= settings.factor
    session.save(student, folder)
    session.say(f"shrink: {settings.say}")
    return {"quality": session.measure(student, "shrink")}


@pytest.fixture
def toy_stage(pipeline):
    pipeline.insert(
        names().index("distill"), Stage("shrink", shrink, reads=("shrink",), settings=ShrinkConfig, makes_student=True)
    )


def written_in(folder):
    return HybridForCausalLM.from_pretrained(folder / "inside")


def write(student, folder, dtype):
    student.to(dtype).save_pretrained(folder / "inside")
    (folder / "toy.json").write_text(json.dumps({"layers": len(student.config.mixers)}))


def check(student, folder, dtype, tokenizer):
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        own, found = (model(ids, use_cache=False).logits for model in (student, written_in(folder)))
    if not torch.equal(own, found):
        raise ExportError("the toy is another one")
    return {"logits": 0.0, "decode": 0.0, "scale": own.abs().max().item()}


@pytest.fixture
def toy_format(monkeypatch):
    toy = Format(
        "toy",
        why_no_student=lambda config: None if config.mixer == "toy" else "it holds toys",
        why_not=lambda student: None,
        write=write,
        check=check,
        check_tokenizer=lambda student, tokenizer: None,
        note=lambda student: "It is a toy.",
        snippet=lambda path: f"play('{path}')",
        load=written_in,
    )
    monkeypatch.setitem(FORMATS, "toy", toy)


# All the way


def teacher_of(family, **fields):
    """A tiny random model of a family in which no bias is zero and no norm is one."""
    sizes = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **fields)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def toy_teacher(toy_family, tmp_path):
    """A folder with a teacher of the toy family."""
    model = teacher_of("persimmon", max_position_embeddings=512, qk_layernorm=False)
    model.save_pretrained(tmp_path / "teacher")
    byte_tokenizer().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def run(folder, *overrides):
    out = io.StringIO()
    recipe = load_recipe(TINY, [f"run.dir={folder}", "student.mixer=toy", "student.keep_attention=null", *overrides])
    return run_recipe(recipe, console=Console(file=out, width=200)), out.getvalue()


def say(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_toys_of_all_four_kinds_go_all_the_way(
    toy_mixer, toy_teacher, toy_stage, toy_format, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    teacher, folder = f"teacher.source={toy_teacher}", tmp_path / "run"
    settings = (teacher, "student.start=1.5", "shrink.factor=0.9", "export.format=toy")
    plan = say(capsys, "plan", TINY, "student.mixer=toy", "student.keep_attention=null", teacher)
    assert plan.count("toy") == 3 and "query_key_value.weight[32:48 of each 48]" in plan
    assert "the states that take its place are 768 bytes a sequence" in plan  # 3 layers x 4 heads x 16 x 4 bytes
    session, out = run(folder, *settings)
    mixers = ["toy", "toy", "toy", "attention"]
    student = session.student("distill")
    assert student.config.mixers == mixers and isinstance(student.mixer_layers()[0], ToyMixer)
    assert "shrink: shrunk" in out
    started, shrunk = (session.student(stage).mixer_layers()[0].weight for stage in ("transfer", "shrink"))
    assert started.tolist() == [1.5] * 4  # calibrate has nothing to find in it, and align trains it
    torch.testing.assert_close(shrunk, 0.9 * session.student("align").mixer_layers()[0].weight)
    quality = {stage: session.folder(stage).done["quality"]["kl"] for stage in ("transfer", "distill", "evaluate")}
    assert (
        quality["evaluate"] == pytest.approx(quality["distill"], rel=1e-5) and quality["distill"] < quality["transfer"]
    )
    card = (folder / "export" / "toy" / "README.md").read_text()
    assert "`YYYA`" in card and "Y Toy" in card and "It is a toy." in card and "play('FOLDER_OR_HUB_ID')" in card
    _, again = run(folder, *settings, "shrink.say=nothing")  # which changes no result
    assert again.count("done before, reused") == 7
    needs = stage_inputs(load_recipe(TINY, [*settings, "student.mixer=toy", "shrink.factor=0.8"]))
    assert needs["shrink"]["shrink"] == {"factor": 0.8} and needs["distill"]["after"].keys() == {"shrink"}
    assert [line.split()[1] for line in say(capsys, "status", folder).splitlines() if " done " in line].count(
        "shrink"
    ) == 1
    assert "3 of 4 layers are Toy" in Path(say(capsys, "report", folder).strip()).read_text()
    assert say(capsys, "generate", folder, "Hello")
    assert f"{folder}" in say(capsys, "eval", folder, "--teacher", toy_teacher)
    assert "shrink.factor" in say(capsys, "keys") and "student.start" in say(capsys, "keys")


def test_a_toy_mixer_travels_with_its_export(toy_mixer, tmp_path):
    """`export` itself loads it in a process that has neither Transpoint nor this file."""
    student = build_student(teacher_of("llama", num_key_value_heads=2), StudentConfig(mixer="toy", keep_attention=[1]))
    figures = export(student, byte_tokenizer(), tmp_path / "out", "custom")
    assert figures["logits"] < 1e-4 * figures["scale"] and 0 < figures["decode"] < 1e-4 * figures["scale"]
    files = {path.name for path in (tmp_path / "out").glob("*.py")}
    assert "toy_mixer.py" in files and not {"mamba2.py", "modeling_transmamba.py", "ssd_reference.py"} & files


@torch.no_grad()
def test_a_toy_mixer_decodes_packs_and_pads(toy_mixer):
    student = build_student(
        teacher_of("llama", num_key_value_heads=2), StudentConfig(mixer="toy", keep_attention=[])
    ).eval()
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(0))
    whole = student(ids, use_cache=False).logits
    cache, steps = student.new_cache(), []
    for part in ids.split([9, 1, 1, 9], dim=1):
        steps.append(student(part, cache=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole)
    packed = student(ids.view(1, 40), position_ids=torch.arange(20).repeat(2)[None], use_cache=False).logits
    torch.testing.assert_close(packed.view(2, 20, -1), whole)
    mask = torch.ones(2, 25, dtype=torch.long)
    mask[:, :5] = 0
    padded = student(torch.cat([ids[:, :5], ids], 1), attention_mask=mask).logits
    torch.testing.assert_close(padded[:, 5:], whole)


def test_options_of_a_toy_mixer_are_checked(toy_mixer):
    for options, reason in (
        ({"start": -1.0}, "student.start is -1.0; expected at least 0"),
        ({"gate": True}, "student.gate is True, and a toy mixer has no such option: it has start"),
    ):
        with pytest.raises(StudentError, match=f"^{reason}$"):
            StudentConfig(mixer="toy", **options).check()
    with pytest.raises(ConfigError, match="unknown key 'student.stat' .* did you mean 'student.start'"):
        load_recipe(TINY, ["student.mixer=toy", "student.stat=2"])


def test_a_family_without_a_reader_is_refused_and_a_wrong_reader_is_found_out(monkeypatch):
    model = teacher_of("persimmon", qk_layernorm=False)
    with pytest.raises(TeacherError, match="it lacks k_proj, o_proj, q_proj, v_proj"):
        attention_view(model)

    def wrong(model, index, module, name):  # queries, then keys, then values, as it is not
        rows = {part: Rows(64 * i, 64) for i, part in enumerate(("q_proj", "k_proj", "v_proj"))}
        parts = {part: Projection("query_key_value", module.query_key_value, where) for part, where in rows.items()}
        return read_attention(model, index, module, name, **parts, o_proj=Projection("dense", module.dense))

    monkeypatch.setitem(READERS, "persimmon", wrong)
    with pytest.raises(TeacherError, match="it computes something else than attention"):
        attention_view(model)


@pytest.mark.slow
def test_a_stage_may_come_after_distill(pipeline, tmp_path):
    """Of a student with TransPoints, whose schedules are those that distill trained it on."""

    def polish(session, folder):
        student = session.student_before("polish")
        session.save(student, folder)
        return {"quality": session.measure(student, "polish")}

    pipeline.insert(names().index("export"), Stage("polish", polish, reads=(), makes_student=True))
    folder = tmp_path / "run"
    config = TINY.with_name("tiny-transmamba.yaml")
    run_recipe(
        load_recipe(config, [f"run.dir={folder}", "distill.steps=4", "align.steps=2"]), console=Console(quiet=True)
    )
    schedules = json.loads((folder / "evaluate" / "results.json").read_text())["schedules"]
    assert schedules[0]["trained"] and (folder / "polish" / "student" / "config.json").exists()
    assert "after polish" in (folder / "export" / "custom" / "README.md").read_text()


@pytest.mark.parametrize(
    "line, files, reason",
    [
        ("from .helper import one", {"helper.py": "one = 1"}, None),
        ("from .errors import one", {"errors.py": "one = 1"}, "has the name of one of the project's: rename it"),
        ("from .parts.helper import one", {}, "imports .parts.helper, and only files beside it can travel"),
    ],
)
def test_what_a_foreign_mixer_imports_travels_or_is_refused(line, files, reason, tmp_path, monkeypatch):
    for name, text in {**files, "my_mixer.py": f"{line}\n\n\nclass Mine:\n    pass\n"}.items():
        (tmp_path / name).write_text(text)
    mine = type("Mine", (), {"__module__": "my_mixer"})
    monkeypatch.setattr("inspect.getfile", lambda one: str(tmp_path / "my_mixer.py"))
    monkeypatch.setitem(MIXERS, "mine", MixerKind("Mine", "I", mine))
    if reason is None:
        write_code(tmp_path / "out", ["mine"])
        assert {"my_mixer.py", "helper.py", "modeling_mixer.py"} <= {path.name for path in (tmp_path / "out").iterdir()}
    else:
        with pytest.raises(StudentError, match=reason):
            write_code(tmp_path / "out", ["mine"])


@pytest.mark.parametrize(
    "option, right, wrong",
    [
        (Option(4, "taps", 1, 8), [1, 8], [0, 9, 2.5, True, "4", float("nan")]),
        (Option(4, "taps", maximum=8), [-5, 8], [9]),
        (Option(0.5, "share", minimum=0), [0, 7.5], [-1, float("nan"), "x"]),
        (Option(True, "gate"), [True, False], [1, None]),
        (Option("x", "kind"), ["x", "y"], [3]),
        (Option(None, "anything"), [None, 3, "x"], []),
        (Option("silu", "act", choices=("silu", "gelu")), ["gelu"], [None, "auto"]),
    ],
)
def test_values_of_options(option, right, wrong):
    assert option.why_not(option.default) is None
    assert [value for value in right if option.why_not(value)] == []
    assert [value for value in wrong if not option.why_not(value)] == []


def test_mixers_may_share_an_options_name(monkeypatch):
    option = Option("silu", "act", choices=("silu", "gelu"))
    monkeypatch.setitem(MIXERS, "mine", MixerKind("Mine", "I", ToyMixer, {"conv_activation": option}))
    StudentConfig(mixer="mine").check()
    assert StudentConfig(mixer="mine").mixer_options == {"conv_activation": "silu"}
    assert StudentConfig(mixer="mine", conv_activation="gelu").mixer_options == {"conv_activation": "gelu"}
