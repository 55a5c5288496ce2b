"""`transpoint init`: a copy of a recipe that comes with the package."""

import pytest

from transpoint.distill.cli import main
from transpoint.distill.config import load_recipe
from transpoint.distill.shipped import shipped
from transpoint.distill.tasks.config import load_grid


def written(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", shipped())
def test_each_can_be_run_from_where_it_is_written(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "sub/mine.yaml", "--like", name]) == 0
    recipe = load_recipe("sub/mine.yaml")
    assert recipe.run.dir.endswith("runs/mine") and recipe.teacher.source
    assert recipe.data.train == [str(tmp_path / "sub/sample/train.jsonl.zst")] and recipe.data.heldout
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "wrote sub/mine.yaml" and "transpoint run sub/mine.yaml" in told
    before = written(tmp_path)
    assert main(["init", "sub/mine.yaml", "--like", name]) == 0 and written(tmp_path) == before
    assert capsys.readouterr().out.startswith("\ntranspoint plan")


@pytest.mark.parametrize("name", shipped(tasks=True))
def test_so_can_those_of_tasks(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine.yaml", "--like", name]) == 0
    assert capsys.readouterr().out == "wrote mine.yaml\n\ntranspoint tasks mine.yaml\n"
    assert [str(path) for path in written(tmp_path)] == ["mine.yaml"]
    assert load_grid("mine.yaml").config.run.dir.endswith("runs/mine")


def test_it_is_the_demo_where_nothing_is_said(tmp_path):
    assert main(["init", str(tmp_path / "a.yaml")]) == 0
    text = shipped()["smollm2-135m"].read_text()
    assert (tmp_path / "a.yaml").read_text() == text.replace("runs/smollm2-135m", "runs/a")


@pytest.mark.parametrize("taken", ["mine.yaml", "tiny.yaml", "sample/heldout.jsonl.zst"])
def test_nothing_is_written_over(taken, tmp_path, capsys):
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("own")
    assert main(["init", str(tmp_path / "mine.yaml"), "--like", "tiny-transmamba"]) == 1
    assert f"'{tmp_path / taken}' is there already, and something else: remove it" in capsys.readouterr().err
    assert list(written(tmp_path).values()) == [b"own"]


def test_a_recipe_does_not_take_the_name_of_what_it_builds_on(tmp_path, capsys):
    assert main(["init", str(tmp_path / "tiny.yaml"), "--like", "tiny-transmamba"]) == 1
    assert "has the name of the recipe that tiny-transmamba builds on" in capsys.readouterr().err
    assert not written(tmp_path)


@pytest.mark.parametrize("name", ["a,b.yaml", "a: b.yaml", r"a\1 'b'.yaml", "ä }.yaml"])
def test_its_run_has_the_name_of_the_file_whatever_that_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init", name, "--like", "tiny"]) == 0
    assert load_recipe(name).run.dir.endswith("runs/" + name.removesuffix(".yaml"))


@pytest.mark.parametrize("target", [".", "taken/mine.yaml", "sample"])
def test_what_is_in_the_way_is_named(target, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    assert main(["init", target, "--like", "tiny"]) == 1
    assert capsys.readouterr().err.endswith(" is in the way: name another file\n") and len(written(tmp_path)) == 1
