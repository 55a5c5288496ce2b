"""What a wheel holds."""

import tomllib

from run_files import ROOT


def test_every_folder_of_code_is_a_package_of_the_wheel():
    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent for part in ("distill", "students", "teachers") for path in (ROOT / part).rglob("*.py")}
    names = {".".join(("transpoint", *folder.relative_to(ROOT).parts)) for folder in folders}
    assert packages == names | {"transpoint.kernels"}
