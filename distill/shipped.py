"""The recipes that come with the package, and a copy of one to begin from."""

import json
import re
from pathlib import Path

from .errors import RunError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# What recipes lack that say only how to train.
_TEACHER_AND_TEXT = """teacher: {source: smollm2-135m}
data: {train: [sample/train.jsonl.zst], heldout: [sample/heldout.jsonl.zst]}
"""


def shipped(tasks: bool = False) -> dict[str, Path]:
    """The recipes of `transpoint run` by name, or those of `transpoint tasks`."""
    found = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("recipes/*.yaml")])
    return {path.stem: path for path in found if path.stem.endswith("tasks") == tasks}


def write_recipe(target: Path, like: str) -> list[Path]:
    """Writes a copy of a shipped recipe, whose run is named after the file, and beside it what it needs: recipes that
    it builds on, and the sample of text.

    Returns the files written, the recipe first; what was there before with the same content is left out.

    Raises:
        RunError: there is no recipe of that name; or something else is in the place of a file. Nothing is written then.
    """
    of_tasks = shipped(tasks=True)
    if like not in (known := shipped() | of_tasks):
        raise RunError(f"no recipe '{like}' comes with the package; expected one of {', '.join(known)}")
    text = known[like].read_text(encoding="utf-8")
    builds_on = _defaults(text)
    if like not in of_tasks and not builds_on and not re.search(r"(?m)^data:", text):
        text += _TEACHER_AND_TEXT
    run = json.dumps(f"runs/{target.stem}", ensure_ascii=False)  # a text of YAML, whatever is in it
    run = run if re.search(r"[^\w./-]", target.stem) else run.strip('"')
    text, named = re.subn(r"(?m)^run: \{dir: [^,}]+", lambda found: f"run: {{dir: {run}", text)
    assert named == 1, f"{like} names no run folder"
    files = {target: text.encode()}
    files |= {target.parent / name: (CONFIGS / name).read_bytes() for name in builds_on if name != target.name}
    if like not in of_tasks:
        files |= {target.parent / "sample" / path.name: path.read_bytes() for path in sorted(CONFIGS.glob("sample/*"))}
    folders = {folder for path in files for folder in path.parents if folder.exists() and not folder.is_dir()}
    if wrong := [*folders, *(path for path in files if path.is_dir() or path in {p.parent for p in files})]:
        raise RunError(f"'{wrong[0]}' is in the way: name another file")
    new = {path: content for path, content in files.items() if not path.exists() or path.read_bytes() != content}
    if taken := [path for path in new if path.exists()]:
        raise RunError(f"'{taken[0]}' is there already, and something else: remove it, or name another file")
    if target.name in builds_on:
        raise RunError(f"'{target}' has the name of the recipe that {like} builds on: name another file")
    for path, content in new.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return list(new)


def _defaults(text: str) -> list[str]:
    """The files that a shipped recipe builds on, and what these do."""
    found = [name.strip() for names in re.findall(r"(?m)^defaults: \[(.*)\]", text) for name in names.split(",")]
    return found + [more for name in found for more in _defaults((CONFIGS / name).read_text(encoding="utf-8"))]
