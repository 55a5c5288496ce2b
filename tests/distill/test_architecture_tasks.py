"""tasks: items and their answers, training on them through the command, and what is made of it."""

import dataclasses
import itertools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

from run_files import CONFIGS, metrics
from transpoint.distill.cli import main
from transpoint.distill.config import ConfigError
from transpoint.distill.report.tasks import as_markdown, rows_of
from transpoint.distill.run.files import read_json
from transpoint.distill.tasks.config import load_grid
from transpoint.distill.tasks.grid import Outcome, Outcomes, memory_bytes, run_grid
from transpoint.distill.tasks.kinds import TASKS
from transpoint.distill.tasks.task import SPECIAL, TEST, TRAINING, VALIDATION, Generated
from transpoint.students import StudentConfig, layer_plan, untrained

TINY = CONFIGS / "tiny-tasks.yaml"


def drawn(task, count=20, seed=0, stream=TRAINING):
    return Generated(task, stream).batch(0, count, seed, range(count))


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one.keys() | other.keys())


@pytest.mark.parametrize("name", TASKS)
def test_items_follow_from_seed_step_and_slot_alone(name):
    data = Generated(TASKS[name]())
    whole = data.batch(3, 8, 0, range(8))
    halves = [item for slots in (range(4, 8), range(4)) for item in data.batch(3, 8, 0, slots)]
    assert all(map(same, whole, halves[4:] + halves[:4]))
    others = [
        *whole[1:],
        *data.batch(4, 1, 0, range(1)),
        *data.batch(3, 1, 1, range(1)),
        *(drawn(data.task, 1, 3, stream)[0] for stream in (VALIDATION, TEST)),
    ]
    assert not any(same(whole[0], other) for other in others)
    for item in whole:
        assert len(item["position_ids"]) == data.tokens_per_item and item["asked"].diff().gt(0).all()
        assert item["asked"].shape == item["answers"].shape and item["asked"].max() < data.tokens_per_item


@pytest.mark.parametrize("name", [name for name in TASKS if TASKS[name]().symbols])
def test_tokens_are_in_the_vocabulary(name):
    items = drawn(TASKS[name](), 100)
    for key in ("input_ids", "answers"):
        every = torch.stack([item[key] for item in items])
        assert every.min() >= SPECIAL and every.max() < TASKS[name]().vocabulary


def test_recall_asks_for_the_value_that_followed_a_key():
    task = TASKS["mqar"](pairs=5, keys=9, length=40)
    for item in drawn(task):
        ids = item["input_ids"].tolist()
        pairs = dict(zip(ids[0:10:2], ids[1:10:2], strict=True))
        assert len(pairs) == 5
        assert [pairs[ids[place]] for place in item["asked"]] == item["answers"].tolist()
        assert sorted(ids[place] for place in item["asked"]) == sorted(pairs)
        asked = set(item["asked"].tolist())
        assert {ids[place] for place in range(10, 40) if place not in asked} == {SPECIAL}  # no answer is given away


def test_induction_asks_for_what_followed_the_special_token():
    for item in drawn(TASKS["induction"](kinds=6, length=20), 50):
        ids = item["input_ids"].tolist()
        assert ids.count(SPECIAL) == 2 and ids[-1] == SPECIAL
        assert item["answers"].tolist() == [ids[ids.index(SPECIAL) + 1]]


def test_copying_asks_for_all_that_is_no_noise_in_order():
    for item in drawn(TASKS["copying"](copied=3, kinds=5, length=16)):
        ids = item["input_ids"]
        assert ids[ids >= SPECIAL + 2].tolist() == item["answers"].tolist()
        assert (ids[item["asked"]] == SPECIAL + 1).all() and item["asked"].tolist() == [13, 14, 15]


def test_a_needle_is_at_its_depth_and_the_only_one():
    task = TASKS["needle"](keys=5, length=32, lengths=[16])
    assert len(task.parts()) == 8 and {part.length for part in task.parts().values()} == {16, 32}
    for part in [task, *task.parts().values()]:
        for item in drawn(part):
            ids, room = item["input_ids"].tolist(), part.length - 2
            place = ids.index(ids[-1])
            assert ids.count(ids[-1]) == 2 and item["answers"].tolist() == [ids[place + 1]]
            assert int(part.depth_from * room) <= place < part.depth_to * room
            assert ids.count(ids[place + 1]) == 1


def by_turns(item):
    """x (n, D) and y (n,) of an item, and that y has zeros after it."""
    x, y = item["inputs"][::2], item["inputs"][1::2]
    assert (y[:, 1:] == 0).all()
    return x, y[:, 0]


def test_parity_is_that_of_one_set_of_numbers():
    task = TASKS["parity"](points=40, dimensions=5, factors=2)
    hidden = set()
    for item in drawn(task):
        x, y = by_turns(item)
        fits = [pair for pair in itertools.combinations(range(5), 2) if torch.equal(x[:, pair].prod(1), y)]
        assert len(fits) == 1 and (x.abs() == 1).all()
        assert item["asked"].tolist() == list(range(0, 80, 2)) and torch.equal(item["answers"], y)
        hidden |= set(fits)
    assert len(hidden) > 3  # each sequence has its own


@pytest.mark.parametrize("name", ["regression", "outliers"])
def test_regression_is_linear_where_it_is_asked(name):
    task = TASKS[name](points=20, dimensions=4)
    for item in drawn(task):
        x, y = by_turns(item)
        asked = item["asked"] // 2
        found = torch.linalg.lstsq(x[asked[:4]].double(), y[asked[:4], None].double()).solution[:, 0]
        assert torch.allclose(x[asked].double() @ found, y[asked].double(), rtol=1e-3, atol=1e-3)
        assert torch.equal(item["answers"], y[asked]) and (item["asked"] % 2 == 0).all()
        others = [place for place in range(len(x)) if place not in asked]
        assert len(others) == (32 if name == "outliers" else 0)
        assert (x[others] == 1).all() and (y[others] == 1).all()


def test_figures_in_context_are_of_the_last_quarter():
    task = TASKS["regression"](points=8)
    assert task.scored(torch.tensor([[9.0] * 6 + [1.0, 3.0]])) == 2.0


@pytest.mark.parametrize(("name", "figure", "right"), [("regression", "error", 0), ("parity", "accuracy", 1)])
def test_figures_of_who_knows_and_of_who_says_nothing(name, figure, right):
    """The squared error is about 1 for a model that says 0, and a sign is right or not."""
    task = TASKS[name](dimensions=4)
    items = drawn(task, 400)
    answers = torch.stack([item["answers"] for item in items])
    student = untrained("llama", StudentConfig(keep_attention=1.0), hidden_size=16, num_hidden_layers=1)
    objective = task.objective(student)
    assert task.figure == figure and task.scored(objective.figures(answers, answers)) == right
    silent = task.scored(objective.figures(torch.zeros_like(answers), answers))
    assert silent == 0 if name == "parity" else silent == pytest.approx(1, abs=0.1)


def test_what_is_trained_has_no_embeddings_where_there_are_no_tokens():
    student = untrained("llama", StudentConfig(keep_attention=1.0), hidden_size=16, num_hidden_layers=1)
    names = {name: set(TASKS[name]().objective(student).trained()) for name in ("mqar", "regression")}
    assert names["mqar"] - names["regression"] == {"student.model.embed_tokens.weight"}
    assert names["regression"] - names["mqar"] == {
        f"{layer}.{part}" for layer in ("read_in", "read_out") for part in ("weight", "bias")
    }


def grid(folder, *overrides):
    return load_grid(TINY, [f"run.dir={folder}", *overrides])


def only(*tasks):
    """Overrides that leave out all other tasks of the tiny grid."""
    return [f"tasks.{name}=null" for name in load_grid(TINY).tasks if name not in tasks]


@pytest.mark.slow
def test_each_task_trains_through_the_command(tmp_path, capsys):
    out = tmp_path / "out"
    command = ["tasks", str(TINY), f"run.dir={out}", "architectures.mamba2=null"]
    assert main(command) == 0
    said, found = capsys.readouterr().out, read_json(out / "tasks.json")
    assert not found["failed"]
    assert [run["task"] for run in found["runs"]] == list(TASKS)
    assert all(np.isfinite(run["value"]) and run["parameters"] > 0 for run in found["runs"])
    for task in TASKS:
        assert f"\n| {task} |" in (out / "tasks.md").read_text() and task in said
    for name in ("tasks.svg", "memory.svg"):
        assert ElementTree.fromstring((out / name).read_text()).tag.endswith("svg")
    begun = (out / "tasks.json").stat().st_mtime_ns
    assert main(command) == 0
    assert capsys.readouterr().out.count("done before, reused") == len(found["runs"])
    assert read_json(out / "tasks.json") == found and (out / "tasks.json").stat().st_mtime_ns > begun


@pytest.mark.slow
def test_what_can_be_learned_is(tmp_path):
    """Mamba-2 learns to copy selectively, as it is known to, which it cannot from the start."""
    less = [*only("copying"), "architectures.attention=null", "train.lrs=[1e-2]", "train.batch_size=32"]
    less += ["train.checkpoint_every=1000", "measure.items=128"]
    before, after = (run_grid(grid(tmp_path, *less, f"tasks.copying.steps={steps}")).runs[0].value for steps in (0, 90))
    assert before < 0.5 and after > 0.9


@pytest.mark.slow
def test_a_training_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path):
    class Interrupted(Exception): ...

    def interrupt(step):
        if step == 3:
            raise Interrupted

    less = [*only("copying"), "architectures.attention=null"]
    whole = run_grid(grid(tmp_path / "whole", *less))
    with pytest.raises(Interrupted):
        run_grid(grid(tmp_path / "parts", *less), on_step=interrupt)
    parts = run_grid(grid(tmp_path / "parts", *less))
    (one,), (other,) = whole.runs, parts.runs
    assert dataclasses.replace(one, seconds=0) == dataclasses.replace(other, seconds=0)
    folder = "copying-mamba2-lr0.003-seed0"
    assert metrics(tmp_path / "whole", folder) == metrics(tmp_path / "parts", folder)


@pytest.mark.slow
def test_of_several_learning_rates_the_best_is_kept_and_goes_for_further_seeds(tmp_path):
    less = [*only("induction"), "architectures.mamba2=null", "train.lrs=[1e-9,1e-2]", "train.steps=10"]
    found = run_grid(grid(tmp_path, *less), seeds=2)
    folders = sorted(path.parent.name for path in tmp_path.glob("*/done.json"))
    kept = f"{found.runs[0].lr:g}"
    assert [run.lr for run in found.runs] == [found.runs[0].lr] * 2
    assert folders == sorted(
        ["induction-attention-lr1e-09-seed0", "induction-attention-lr0.01-seed0", f"induction-attention-lr{kept}-seed1"]
    )
    by_lr = {lr: read_json(tmp_path / f"induction-attention-lr{lr}-seed0" / "done.json") for lr in ("1e-09", "0.01")}
    assert by_lr[kept]["validation"] == max(record["validation"] for record in by_lr.values())


@pytest.mark.slow
def test_a_training_that_fails_leaves_the_others_be(tmp_path, capsys):
    less = [*only("regression"), "architectures.mamba2=null", "train.max_skipped=1", "train.log_every=1"]
    command = ["tasks", str(TINY), f"run.dir={tmp_path}", *less]
    assert main([*command, "train.lrs=[1e30,1e-3]"]) == 0
    assert "regression-attention-lr1e+30-seed0 failed: " in capsys.readouterr().out
    found = read_json(tmp_path / "tasks.json")
    assert [run["lr"] for run in found["runs"]] == [1e-3] and not found["failed"]
    assert main([*command, "train.lrs=[1e30]"]) == 1
    assert "regression-attention-lr1e+30-seed0 failed: " in capsys.readouterr().err
    found = read_json(tmp_path / "tasks.json")
    assert not found["runs"] and list(found["failed"]) == ["regression-attention-lr1e+30-seed0"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["tasks.x={task: mqr}"], "tasks.x: no task 'mqr'; expected one of mqar, .*; did you mean 'mqar'"),
        (["tasks.mqar.pair=3"], "unknown key 'tasks.mqar.pair'; did you mean 'pairs'"),
        (["tasks.mqar.pairs=9"], "tasks.mqar: pairs is 9; expected at most keys, 4"),
        (["tasks.mqar.pairs=0"], "tasks.mqar.pairs is 0; expected at least 1"),
        (["tasks.mqar.pairs=many"], "tasks.mqar.pairs: .*many"),
        (["tasks.mqar.steps=-1"], "tasks.mqar.steps is -1"),
        (["architectures.x={mixer: mamba3}"], "architectures.x: student.mixer is 'mamba3'; expected one of mamba2, "),
        (["architectures.x={mixr: mamba2}"], "architectures.x: no setting 'mixr' of a student; did you mean 'mixer'"),
        (["architectures.every:2={}"], "architectures: 'every:2' cannot name a folder"),
        (only(), "tasks names none: there is nothing to run"),
        (["architectures={}", "architectures.attention=null", "architectures.mamba2=null"], "architectures names none"),
        (["train.lrs=[]"], "train.lrs is empty"),
        (["train.lrs=[-1]"], "train.lrs is -1.0; expected more than 0"),
        (["trian.steps=3"], "unknown key 'trian'; did you mean 'train'"),
    ],
)
def test_what_cannot_be_run_is_said_in_one_line(overrides, said):
    with pytest.raises(ConfigError, match=said) as caught:
        load_grid(TINY, overrides)
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_be_is_refused_before_anything_trains(tmp_path, capsys):
    assert main(["tasks", str(TINY), f"run.dir={tmp_path}", "architectures.x={keep_attention: [7]}"]) == 1
    assert "student.keep_attention holds layer 7" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_grid_that_ships_has_each_task_and_layer_plans_that_can_be():
    found = load_grid(CONFIGS / "tasks.yaml")
    assert set(found.tasks) == set(TASKS)
    plans = [
        layer_plan(one.student, one.sizes["num_hidden_layers"], from_scratch=True)
        for one in found.architectures.values()
    ]
    assert len(set(map(tuple, plans))) > 7


def test_what_is_remembered():
    def of(length, **student):
        return memory_bytes(untrained("llama", StudentConfig(**student), hidden_size=64, num_hidden_layers=2), length)

    attention = 2 * 10 * 2 * 64 * 2  # layers, tokens, keys and values, bfloat16
    state = 4 * 4 * 16 * 16  # heads, P, N of float32
    assert of(10, keep_attention=1.0) == attention
    assert of(10, mixer="mamba2", keep_attention=[]) == of(99, mixer="mamba2", keep_attention=[]) == 2 * state
    assert of(10, mixer="mamba2", keep_attention=[1]) == attention // 2 + state
    window = {"mixer": "mamba2", "keep_attention": 1.0, "attention_window": 20}
    assert (of(10, **window), of(20, **window), of(50, **window)) == (attention, 2 * attention, 2 * attention)


def test_the_table_has_means_over_seeds_and_what_failed():
    def run(seed, value, name="a"):
        return Outcome("mqar", name, seed, 1e-3, "accuracy", True, value, {"deep": value / 2}, 2048, 1000, 3.0)

    found = Outcomes([run(0, 0.25), run(1, 0.75), run(0, 1.0, "b")], {"mqar-c": "it diverged"})
    assert rows_of(found) == [
        ["task", "figure", "a", "b"],
        ["mqar", "accuracy", "0.500 ± 0.354", "1.000"],
        ["mqar, deep", "accuracy", "0.250 ± 0.177", "0.500"],
    ]
    text = as_markdown(found)
    assert "| mqar | a | 0.001 | 1,000 | 2,048 | 3 |" in text and "mqar-c failed: it diverged" in text
