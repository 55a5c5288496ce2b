"""What a wheel holds, and that it works."""

import os
import shutil
import subprocess
import sys
import tomllib

import pytest

from run_files import ROOT


def test_every_folder_of_code_is_a_package_of_the_wheel():
    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent for part in ("distill", "students", "teachers") for path in (ROOT / part).rglob("*.py")}
    names = {".".join(("transpoint", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert packages == names | {"transpoint.kernels", "transpoint.configs"}


@pytest.mark.stack
@pytest.mark.slow
def test_the_wheel_of_the_source_archive_runs_a_recipe_that_it_brings(tmp_path):
    """Where the repository is not: in an empty folder, with nothing of it to be imported."""

    def done(*command, cwd=tmp_path, **more):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **more}
        found = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout

    copy = tmp_path / "copy"  # a build leaves folders behind
    for name in ("distill", "students", "kernels", "teachers", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    done("-c", "from setuptools import build_meta; build_meta.build_sdist('..')", cwd=copy)
    (archive,) = tmp_path.glob("*.tar.gz")
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    install = ("-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation")
    done(*install, "--no-index", "--no-compile", "--target", site, archive)
    own = {"cwd": empty, "PYTHONPATH": str(site)}
    told = done("-P", "-m", "transpoint.distill", "init", "first.yaml", "--like", "tiny", **own)
    assert told.splitlines()[0] == "wrote first.yaml" and str(site / "transpoint" / "configs" / "accelerate") in told
    run = "import sys; from transpoint.distill.cli import main; assert main(sys.argv[1:]) == 0"
    where = "from transpoint.kernels import ssd; print(ssd.__file__)"
    less = ("align.steps=2", "--until", "align")
    told = done("-P", "-c", f"{run}; {where}", "run", "first.yaml", *less, **own)
    assert (empty / "runs" / "first" / "align" / "done.json").is_file()
    assert told.splitlines()[-1].startswith(str(site))
