"""The HTML page of a run: read as a browser reads it, of finished, unfinished, damaged and hostile runs."""

import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import yaml

from run_files import STAGES, without_logs
from transpoint.distill.cli import main
from transpoint.distill.config import Recipe
from transpoint.distill.errors import RunError
from transpoint.distill.report.page import write_report
from transpoint.distill.report.seconds import seconds_table
from transpoint.distill.run.files import write_json
from transpoint.distill.stages.inputs import lineage

HOSTILE = "<script>alert('x')</script> & \"quoted\" \x00\x1b[31m \ud800"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements (tag, attributes) and text of a page; fails where tags are not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.raw, self.elements, self.texts, self.open = text, [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(" ".join(data.split()))

    @property
    def text(self):
        return " ".join(text for text in self.texts if text)

    def all(self, tag, **attributes):
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]


def page(folder) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tiny_run, tmp_path_factory) -> Page:
    """The page of a finished run."""
    return Page(write_report(tiny_run, tmp_path_factory.mktemp("page") / "whole.html").read_text(encoding="utf-8"))


def figures(shown: Page):
    return [svg["aria-label"] for svg in shown.all("svg", role="img")]


@pytest.fixture
def started(tmp_path):
    """A run folder made by hand, of which nothing but a recipe is there: started(stage, lines, **done)."""
    recipe = Recipe()
    recipe.run.dir, recipe.teacher.source = str(tmp_path / "hand"), "OWNER/NAME"
    folder = tmp_path / "hand"
    folder.mkdir()
    recipe.save(folder / "recipe.yaml")

    def stage(name, lines=(), **done):
        (folder / name).mkdir(exist_ok=True)
        write_json(folder / name / "stage.json", {"settings": name})
        with (folder / name / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        if done:
            write_json(folder / name / "done.json", done)

    stage.folder = folder
    return stage


def test_a_finished_run(tiny_copy, capsys):
    assert main(["report", str(tiny_copy)]) == 0
    out = tiny_copy / "report.html"
    assert capsys.readouterr().out.strip() == str(out)
    shown = Page(out.read_text())
    quality = json.loads((tiny_copy / "evaluate" / "results.json").read_text())["quality"]
    teacher = json.loads((tiny_copy / "teacher_quality.json").read_text())
    assert "exported checkpoint " + f"{quality['kl']:.4f} {quality['perplexity']:.2f}" in shown.text
    assert f"teacher 0.0000 {teacher['perplexity']:.2f} {teacher['bits_per_byte']:.4f} 100.0 %" in shown.text
    for stage in ("transfer", "calibrate", "align", "distill", "export", "evaluate"):
        assert f"{stage}: done" in shown.text
    for stage in ("transfer", "calibrate", "align", "distill"):
        assert f"after {stage}" in shown.text
    layers = [entry["aria-label"] for entry in shown.all("li") if "aria-label" in entry]
    kinds = ["Mamba-2", "attention"] * 2
    assert layers == [f"layer {layer}: {kind}" for layer, kind in enumerate(kinds)]
    drawn = figures(shown)
    assert [label.split(" ")[0:3] for label in drawn[:3]] == [
        ["loss", "of", "align"],
        ["loss", "of", "distill"],
        ["alignment", "of", "each"],
    ]
    assert any(label.startswith("tokens a second") for label in drawn)
    assert yaml.safe_load((tiny_copy / "recipe.yaml").read_text())["align"]["steps"] == 20
    recipe = shown.raw[shown.raw.index("<pre>") :]
    assert "checkpoint_every: 10" in recipe and "micro_batch_size: null" in recipe
    assert "What is the capital of France?" in shown.text
    assert f"start {' '.join(STAGES)} all share" in shown.text
    assert out.stat().st_size < 500_000


def test_where_the_time_went(tiny_copy):
    records = {stage: json.loads((tiny_copy / stage / "done.json").read_text()) for stage in STAGES}
    records["transfer"] |= {"taken_over": "/runs/other"}
    records["align"] |= {"starts": 3, "stage_seconds": 5000.0, "seconds": {"steps": 4000.0, "saving": 0.01, "x": 9.0}}
    del records["distill"]["seconds"], records["distill"]["starts"]  # of an earlier version
    records["distill"]["stage_seconds"] = 5000.0
    for stage in ("calibrate", "export", "evaluate"):
        records[stage] |= {"stage_seconds": 0.0, "seconds": {}}
    for stage, record in records.items():
        write_json(tiny_copy / stage / "done.json", record)
    write_json(tiny_copy / "seconds.json", {"stage_seconds": 2.5, "seconds": {"importing": 2.5}})
    found = seconds_table(tiny_copy, lineage(tiny_copy))
    assert found.head == ["", "start", *STAGES, "all", "share"]
    assert found.rows == [
        ["importing", "2.5", "", "", "", "", "", "", "2.5", "0%"],
        ["steps", "", "", "", "4,000", "", "", "", "4,000", "40%"],
        ["other", "", "", "", "1,000", "5,000", "", "", "6,000", "60%"],
        ["all", "2.5", "", "", "5,000", "5,000", "", "", "10,002", "100%"],
    ]
    killed = "a start that was killed counts up to its last checkpoint"
    assert found.notes == ["transfer: taken over from other", f"align: in 3 starts ({killed})"]
    for name in ("seconds.json", *(f"{stage}/done.json" for stage in STAGES)):
        (tiny_copy / name).write_text('{"stage_seconds": Infinity, "seconds": {"steps": NaN}}')
    assert seconds_table(tiny_copy, lineage(tiny_copy)) is None


def test_it_loads_nothing(whole):
    for tag, attributes in whole.elements:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in whole.raw and whole.raw.count("url(") == whole.raw.count("url(#")
    (policy,) = whole.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'")


def test_figures_are_xml_with_ids_of_their_own(whole):
    ids = [attributes["id"] for _, attributes in whole.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = [a["xlink:href"][1:] for _, a in whole.elements if a.get("xlink:href", "").startswith("#")]
    assert used and set(used) <= set(ids)
    for part in whole.raw.split("<svg")[1:]:
        picture = "<svg xmlns:xlink='x'" + part[: part.index("</svg>")] + "</svg>"
        ElementTree.fromstring(picture)
        assert "var(--" in picture  # the colours are the page's, light or dark


def test_what_people_wrote_is_escaped(tiny_copy):
    results = json.loads((tiny_copy / "evaluate" / "results.json").read_text())
    results["answers"] = [{"prompt": HOSTILE, "teacher": HOSTILE, "student": "two\nlines </blockquote></main>"}]
    (tiny_copy / "evaluate" / "results.json").write_text(json.dumps(results))
    recipe = yaml.safe_load((tiny_copy / "recipe.yaml").read_text())
    recipe["teacher"]["source"] = recipe["data"]["train"][0] = "/x/<img src=x onerror=alert(1)>.jsonl"
    (tiny_copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    log = (tiny_copy / "align" / "metrics.jsonl").read_text().splitlines()
    line = json.loads(log[-1]) | {"event": HOSTILE, "<b>part</b>": 1.5}
    (tiny_copy / "align" / "metrics.jsonl").write_text("\n".join([*log[:-1], json.dumps(line)]) + "\n")
    record = json.loads((tiny_copy / "calibrate" / "done.json").read_text()) | {"taken_over": f"/runs/{HOSTILE}"}
    (tiny_copy / "calibrate" / "done.json").write_text(json.dumps(record))
    folder = tiny_copy.rename(tiny_copy.with_name("run <i>&amp;"))
    shown = page(folder)
    assert not shown.all("script") and not shown.all("b", **{"onerror": "alert(1)"}) and not shown.all("img")
    assert shown.text.count("<script>alert('x')</script> & \"quoted\"") == 3  # prompt, teacher, event
    assert 'calibrate: taken over from script> & "quoted"' in shown.text
    assert "two lines </blockquote></main>" in shown.text and "run <i>&amp;" in shown.text
    assert "<img src=x onerror=alert(1)>.jsonl" in shown.text
    assert not any(character in shown.raw for character in "\x00\x1b\ud800")


def test_a_run_that_has_only_begun(started):
    shown = page(started.folder)
    assert "transfer: not run" in shown.text and "Nothing is measured yet." in shown.text
    assert "OWNER/NAME" in shown.text and not figures(shown)


def test_an_unfinished_stage(started):
    started("align", [{"step": step, "loss": 1 / step, "layer_0": 0.5} for step in range(1, 31)])
    shown = page(started.folder)
    assert "align: at step 30 of 100" in shown.text and "distill: not run" in shown.text
    assert figures(shown)[0] == "loss of align over 30 steps, from 1 to 0.03333"


@pytest.mark.parametrize("lines", [1, 2, pytest.param(5000, marks=pytest.mark.slow)])
def test_logs_short_and_long(started, lines):
    figures_of_step = {"loss": 0.5, "gradient_norm": 1, "lr": 0, "tokens_per_second": 9e5, "mfu": 0.4, "memory": 2**34}
    started(
        "align",
        [{"step": 10 * step, **figures_of_step, **{f"layer_{i}": 0.1 for i in range(80)}} for step in range(lines)],
    )
    shown = page(started.folder)
    assert len(figures(shown)) == 5 and len(shown.raw) < 1_000_000
    assert "40.0 %" in shown.text and "16.0 GiB" in shown.text


def test_both_forms_and_trans_points(started):
    points = [0, 64, "inf", 8192]
    started("transfer", mixers=["transmamba"] * 4, quality={"kl": 1.5, "perplexity": 20000.0})
    lines = [
        {"step": step, "loss": 1.0, "kl": 0.9, **{f"layer_{i}": 0.5 / step for i in range(4)}, "attention_1": 0.01}
        for step in range(1, 6)
    ]
    started("align", lines)
    student = started.folder / "align" / "student"
    student.mkdir()
    write_json(student / "config.json", {"mixers": ["transmamba"] * 4, "trans_points": points})
    shown = page(started.folder)
    cells = [entry for entry in shown.all("li", class_="mixer")]
    assert [cell["aria-label"].split("TransPoint ")[1] for cell in cells] == ["0", "64", "∞", "8,192"]
    shares = [float(cell["style"].split(":")[1].rstrip("%")) for cell in cells]
    assert shares[0] == 0 and shares[2] == 100 and shares[0] < shares[1] < shares[3] < 100
    assert [label.split(", over")[0] for label in figures(shown)[1:3]] == [
        "alignment of each layer, state-space form",
        "alignment of each layer, attention form",
    ]
    assert "4 of 4 layers are TransMamba" in shown.text and "20,000" in shown.text
    assert "after transfer 1.5000 20,000 – –" in shown.text


def test_schedules(tiny_copy):
    without_logs(tiny_copy)
    results = json.loads((tiny_copy / "evaluate" / "results.json").read_text())
    quality = results["quality"] | {"late": 32, "late_kl": 0.0625}
    cost = {"length": 64, "attention": 0.25, "cache_bytes": 2**21, "prefill_seconds": 0.5, "decode_seconds": None}
    rows = [{"schedule": "[0, 8]", "trans_points": [0, 8], "trained": True, "quality": quality, "cost": cost}, None, 3]
    (tiny_copy / "evaluate" / "results.json").write_text(json.dumps(results | {"schedules": rows}))
    text = page(tiny_copy).text
    assert "KL past 32" in text and "25.0 % 2.00 MiB 500.0 ms – ms" in text


def test_events(started):
    lines = [{"step": step, "loss": 1.0} for step in range(1, 400)]
    lines[9] |= {"skipped": 2, "loss": math.nan}
    lines[19] |= {"event": "loss spike", "loss": 9.5}
    started("distill", lines)
    shown = page(started.folder)
    assert "distill 10 2 steps skipped: the gradient was not finite –" in shown.text
    assert "distill 10 the loss was not finite" in shown.text and "distill 20 loss spike 9.5000" in shown.text
    assert "skipped steps" in shown.raw and figures(shown)[0].startswith("loss of distill over 399 steps")
    for line in lines:
        line["event"] = "again"
    (started.folder / "distill" / "metrics.jsonl").unlink()
    started("distill", lines)
    shown = page(started.folder)
    assert shown.text.count(" again ") == 198 and "And 201 more." in shown.text


@pytest.mark.slow
def test_damaged_records(tiny_copy):
    log = tiny_copy / "align" / "metrics.jsonl"
    whole = log.read_bytes()
    log.write_bytes(
        b'\xff\xfe\n[1]\n{"step": "x", "loss": 1}\n{"step": 1e999}\n{"step": 7}\n{"step": 8, "loss": "high"}\n'
        b'{"step": null}\n' + whole + b'{"step": 99, "lo'
    )
    shown = page(tiny_copy)
    assert "6 damaged lines of align/metrics.jsonl are left out." in shown.text
    assert figures(shown)[0].startswith("loss of align over 20 steps")
    without_logs(tiny_copy)
    for name in ("distill/done.json", "teacher_quality.json", "evaluate/results.json", "transfer/done.json"):
        for content in ("[]", '{"quality": 3, "mixers": "all", "training": [], "schedules": {"x": 1}}', "{"):
            before = (tiny_copy / name).read_text()
            (tiny_copy / name).write_text(content)
            assert "The whole recipe" in page(tiny_copy).text
            (tiny_copy / name).write_text(before)
    (tiny_copy / "transfer" / "stage.json").write_text('"x"')
    (tiny_copy / "calibrate" / "stage.json").write_text("{}")
    assert "align: of earlier settings" in page(tiny_copy).text
    (tiny_copy / "recipe.yaml").write_text("run: [unclosed")
    shown = page(tiny_copy)
    assert "The recipe cannot be read." in shown.text and "run: [unclosed" in shown.text


def test_stages_of_earlier_settings_give_no_quality(tiny_copy):
    without_logs(tiny_copy)
    started = json.loads((tiny_copy / "align" / "stage.json").read_text())
    (tiny_copy / "align" / "stage.json").write_text(json.dumps(started | {"after": {"calibrate": "another"}}))
    shown = page(tiny_copy)
    assert "distill: of earlier settings" in shown.text and "after calibrate" in shown.text
    assert "after distill" not in shown.text and "exported checkpoint" not in shown.text


def test_written_whole_or_not_at_all(tiny_copy, tmp_path, capsys, monkeypatch):
    without_logs(tiny_copy)
    out = tmp_path / "pages" / "mine.html"
    assert main(["report", str(tiny_copy), "--out", str(out)]) == 1
    assert "the report cannot be written to" in capsys.readouterr().err
    out.parent.mkdir()
    assert main(["report", str(tiny_copy), "--out", str(out)]) == 0
    before = out.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transpoint.distill.report.page.os.replace", full)
    with pytest.raises(RunError, match="the report cannot be written to .*mine.html.*No space left"):
        write_report(tiny_copy, out)
    assert out.read_bytes() == before and [path.name for path in out.parent.iterdir()] == ["mine.html"]


def test_what_is_missing(tiny_copy, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="is no run folder: it has no recipe.yaml"):
        write_report(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RunError, match=r"a report needs matplotlib: pip install 'transpoint\[figure\]'"):
        write_report(tiny_copy)


def test_recall_by_depth_and_length(tiny_copy):
    without_logs(tiny_copy)
    path = tiny_copy / "evaluate" / "results.json"
    results = json.loads(path.read_text())
    depths, right = [0.1, 0.2, 0.6, 0.9], {"teacher": [True] * 4, "student": [True, False, False, False]}
    for model, own in right.items():
        one = {"task": "passkey", "length": 128, "answers": 4, "accuracy": 0.5, "depths": depths, "right": own}
        results["measures"][model]["recall"] = [one, one | {"length": 4096}, one | {"task": "pairs", "depths": []}]
    path.write_text(json.dumps(results))
    shown = page(tiny_copy)
    assert "depth teacher, 128 teacher, 4,096 student, 128 student, 4,096" in shown.text
    assert "0 to 25 % 100 % 100 % 50 % 50 % 25 to 50 % – – – – 50 to 75 % 100 % 100 % 0 % 0 %" in shown.text
    assert shown.text.count("answers given, by where") == 1 and "pairs (128 tokens) 50.0% 50.0%" in shown.text
    results["measures"]["teacher"]["recall"][0]["right"] = [True]  # damaged
    path.write_text(json.dumps(results))
    assert "passkey (128 tokens)" in page(tiny_copy).text


def test_what_select_found_is_drawn(tmp_path, run_tiny):
    more = ("student.keep_attention=select:2", "select.length=128", "select.items=2", "select.sequences=2")
    run_tiny(tmp_path / "run", *more, until_stage="transfer")
    shown = page(tmp_path / "run")
    (label,) = figures(shown)
    assert label.startswith("what the teacher loses without the attention of each layer; in recall most without that")
    record = json.loads((tmp_path / "run" / "select" / "done.json").read_text())
    del record["selection"]["alone"]["1"]
    write_json(tmp_path / "run" / "select" / "done.json", record)
    assert figures(page(tmp_path / "run")) == []
