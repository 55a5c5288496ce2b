"""configs/recipes: each loads alone and on a base, fits a teacher, and divides its tokens as published."""

import pytest
import yaml

from run_files import CONFIGS, TINY
from transpoint.distill.compare import load_recipes, training_tokens
from transpoint.distill.config import load_recipe
from transpoint.distill.stages.pipeline import pipeline_of
from transpoint.distill.stages.select import as_far_as_known
from transpoint.students import plan_student
from transpoint.teachers import load_teacher

RECIPES = sorted((CONFIGS / "recipes").glob("*.yaml"))
# Millions of tokens of each stage, or parts of them; see the files for where this is said.
PUBLISHED = {
    "halo": {"align": 20_000 * 32 * 512 / 1e6, "distill": 20_000 * 96 * 512 / 1e6},
    "mamba-in-llama": {"distill": 20_000},
    "mohawk": {"orient": 80, "align": 160, "distill": 2760},
    "radlads": {"align": 100, "distill": 500},
    "taylor-calibrate": {"align": 100, "distill": 600},
    "transpoint": {"align": 6, "distill": 12},
    "transpoint-window": {"align": 6, "distill": 12},
}


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("random-llama")[0]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_it_loads_and_fits_a_teacher(path, teacher):
    assert not {"teacher", "data", "evaluate"} & set(yaml.safe_load(path.read_text()))  # the base's
    for recipe in (load_recipe(path), load_recipe(path, base=TINY)):
        for stage in pipeline_of(recipe):
            stage.check(recipe)
        student, _ = as_far_as_known(recipe, teacher.config.num_hidden_layers)
        plan_student(teacher, student)


def test_tokens_are_divided_as_published():
    paths = [str(path) for path in RECIPES]
    load_recipes(paths, ["data.length=2048"])  # at equal tokens as they are
    million = 1_000_000
    recipes = load_recipes(paths, [], str(TINY), tokens=18 * million)
    assert set(recipes) == set(PUBLISHED)
    for name, recipe in recipes.items():
        assert training_tokens(recipe) == pytest.approx(18 * million, rel=1e-3)
        whole = sum(PUBLISHED[name].values())
        for stage in (stage for stage in pipeline_of(recipe) if stage.trains):
            tokens = stage.of(recipe).steps * stage.of(recipe).batch_size * recipe.length_in(stage.name)
            assert tokens == pytest.approx(18 * million * PUBLISHED[name].get(stage.name, 0) / whole, rel=0.01), name
