"""The model card of an exported checkpoint: where it comes from, what was measured, how to load it."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined

from ...students.modeling.configuration_mixers import MIXERS, have_trans_points
from ...teachers.names import TeacherInfo
from ..config import for_others
from ..measure.figures import filled, rows_beside
from ..run.records import Cost, Measures, Quality, ScheduleRecord, read_record, shown
from .engines import WRONG
from .formats import Format, quantising_costs

if TYPE_CHECKING:
    from ...students import HybridForCausalLM


@dataclass
class CardFacts:
    """What a card says besides what the student itself shows."""

    teacher: TeacherInfo | None = None
    recipe: dict | None = None
    tokens: dict[str, int] = field(default_factory=dict)  # training stage -> tokens seen
    quality: list[dict] = field(default_factory=list)  # rows: {"model", and the fields of Quality}
    measures: dict[str, Measures] = field(default_factory=dict)  # of "teacher" and "student"


def write_card(
    folder: Path, student: "HybridForCausalLM", format: Format, figures: dict[str, float], facts: CardFacts
) -> None:
    """Writes README.md into an exported folder. `figures` are those of `export.verify`."""
    scratch = student.config.scratch_seed is not None
    teacher = facts.teacher or TeacherInfo("an unnamed teacher")
    mixers = student.config.mixers
    kinds = kinds_in(mixers)
    front = ModelCardData(
        license=None if scratch else teacher.license or "unknown",
        base_model=None if scratch else teacher.hub_id,
        library_name=format.library,
        pipeline_tag="text-generation",
        tags=["transpoint", *kinds, *(["from-scratch"] if scratch else ["hybrid", "distillation"])],
    )
    known = getattr(student.config, "measured_trans_points", None) or ()
    measured = [read_record(ScheduleRecord, record) for record in known]
    beside = rows_beside(facts.measures)
    text = _TEMPLATE.render(
        front=front.to_yaml().strip(),
        teacher=None if scratch else teacher,
        kinds=list(kinds.values()),
        letters=[f"{letter(name)} {words}" for name, words in {"attention": "attention", **kinds}.items()],
        converted=sum(mixer != "attention" for mixer in mixers),
        layers=len(mixers),
        plan=plan_in_letters(mixers),
        trans_points=student.trans_points if have_trans_points(mixers) else None,
        choosing=[words for name, words in kinds.items() if have_trans_points([name])],
        schedules=[record for record in measured if record.cost is not None],
        schedule_table=lambda records: _markdown(_schedule_head(records), schedule_rows(records)),
        tokens=facts.tokens,
        quality=facts.quality,
        quality_table=_markdown(_QUALITY, [_quality_cells(row) for row in facts.quality]),
        measures=_markdown(("", "teacher", "student"), beside) if beside else "",
        note=format.note(student),
        engines=format.engines(student),
        wrong=WRONG,
        library=format.library,
        figures=figures,
        costs=quantising_costs(figures),
        recipe=recipe_text(facts.recipe).strip() if facts.recipe is not None else None,
        load=format.snippet("FOLDER_OR_HUB_ID"),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def recipe_text(recipe: dict) -> str:
    """A run's recipe, as `to_dict` gives it, as YAML that others run: it names no place on this machine."""
    recipe = for_others(recipe)  # where this run lay, and kept its tokens, is of no use to anybody else
    recipe["run"].pop("dir", None)
    recipe["data"].pop("cache", None)
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)


def kinds_in(mixers: list[str]) -> dict[str, str]:
    """The mixers of a layer plan besides attention, and what people call each: by its own name where that is not known
    here."""
    present = sorted(set(mixers) - {"attention"}, key=[*MIXERS, *mixers].index)
    return {name: MIXERS[name].title if name in MIXERS else name for name in present}


def letter(mixer: str) -> str:
    """What a layer is in a plan: A for attention; of a mixer that is not known here the first of its name."""
    return MIXERS[mixer].letter if mixer in MIXERS else mixer[0].upper()


def plan_in_letters(mixers: list[str]) -> str:
    """One letter a layer, as AMAM."""
    return "".join(map(letter, mixers))


def plan_in_words(mixers: list[str]) -> str:
    """`10 of 30 layers are Mamba-2`."""
    found = [f"{mixers.count(kind)} of {len(mixers)} layers are {name}" for kind, name in kinds_in(mixers).items()]
    return ", ".join(found) or f"all {len(mixers)} layers are attention"


def schedule_rows(records: list[ScheduleRecord]) -> list[tuple[str, ...]]:
    """The records of `evaluate` as rows of text: schedule, trained on, quality, cost."""
    rows: list[tuple[str, ...]] = []
    for record in records:
        quality, cost = record.quality or Quality(), record.cost or Cost()
        rows.append(
            (
                record.schedule,
                "yes" if record.trained else "no",
                shown(quality.kl, "{:.4f}"),
                shown(quality.late_kl, "{:.4f}"),
                shown(quality.perplexity, "{:.2f}"),
                shown(quality.same_top, "{:.1%}"),
                shown(cost.attention, "{:.1%}"),
                shown(cost.cache_bytes, "{:.2f} MiB", 2**-20),
                shown(cost.prefill_seconds, "{:.0f} ms", 1e3),
                shown(cost.decode_seconds, "{:.1f} ms", 1e3),
            )
        )
    return rows


def quality_row(model: str, quality: Quality) -> dict:
    """A row of `CardFacts.quality`."""
    return {"model": model, **dataclasses.asdict(quality)}


_QUALITY = ("model", "perplexity", "bits per byte", "KL from teacher, nats per token", "same most likely token")


def _quality_cells(row: dict) -> tuple[str, ...]:
    return (
        row["model"],
        shown(row["perplexity"], "{:.2f}"),
        shown(row["bits_per_byte"], "{:.4f}"),
        shown(row["kl"], "{:.4f}"),
        shown(row["same_top"], "{:.1f} %", 100),
    )


def _schedule_head(records: list[ScheduleRecord]) -> tuple[str, ...]:
    late = (records[0].quality or Quality()).late
    kl = ("KL", f"KL past {late}")
    return ("schedule", "trained on", *kl, "perplexity", "same top", "attention", "cache", "prefill", "next token")


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without the columns that are empty."""
    head, cells = filled(head, rows)
    return "\n".join((_line(head), "|---" * len(head) + "|", *map(_line, cells)))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escaped(text: str) -> str:
    """Text whose characters have no meaning in Markdown."""
    return re.sub(r"([\\`*_\[\]()<>|#])", r"\\\1", text)


_ENVIRONMENT = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters |= {"escaped": _escaped, "shown": shown}
_TEMPLATE = _ENVIRONMENT.from_string(
    """\
---
{{ front }}
---

{% if teacher is none %}
# A {{ kinds | join(" and ") | escaped if kinds else "Transformer" }}
{{- " hybrid" if kinds and converted < layers }}, trained from scratch

{% if kinds %}
{{ converted }} of its {{ layers }} layers are {{ kinds | join(" or ") | escaped }} layers
{{- ", the others attention" if converted < layers }}.
{% endif %}
It was trained on text with Transpoint, from random weights.
{% else %}
# A {{ kinds | join(" and ") | escaped }} hybrid of {{ teacher.name | escaped }}

{{ converted }} of the {{ layers }} attention layers of
{{ "[%s](https://huggingface.co/%s)" | format(teacher.name | escaped, teacher.hub_id)
   if teacher.hub_id else teacher.name | escaped }}
{{- " (commit `%s`)" | format(teacher.commit) if teacher.commit else "" }}
are {{ kinds | join(" or ") | escaped }} layers here, made with Transpoint: their weights were transferred from the
attention they replace
{%- if "align" in tokens %}, aligned layer by layer{% endif %}
{%- if "distill" in tokens %}, and distilled end to end{% endif %}
{%- if "tune" in tokens %}, and tuned on answers{% endif %}.
{%- if converted < layers %} The other layers keep the teacher's attention.{% endif %}
{% endif %}

Layer plan ({{ letters | join(", ") }}), first layer to last: `{{ plan }}`

{% if trans_points is not none %}
A {{ choosing | join(" or ") }} layer computes the first tokens of a sequence, up to its TransPoint, by attention, and
later ones by a state space with the same weights, whose memory does not grow. TransPoints, first layer to last:
`{{ trans_points | join(" ") }}`. Choose others with `from_pretrained(..., trans_points=...)` or
`model.set_trans_points(...)`.
{% endif %}

{% if teacher is none %}
Licence: for whoever trained it to say.
{% elif teacher.license %}
Licence: that of the teacher, {{ teacher.license }}.
{% else %}
Licence: the teacher's, which could not be read from its files; look it up before you share this model.
{% endif %}

## How to load

```python
{{ load }}
```

{{ note }}

{% if engines %}
## In other programs

{% for engine in engines %}
- {{ "**%s computes %s**" | format(engine.name, engine.does) if engine.does == wrong
     else "%s: %s" | format(engine.name, engine.does) }}{{ ": %s" | format(engine.words) if engine.words else "" }}
{% endfor %}

What is the same was compared by running it, or reads so in the program's code.
{% endif %}

{% if quality %}
## Quality on held-out text

{{ quality_table }}

Measured on {{ quality[0].tokens | shown("{:,}") }} tokens.
{% endif %}

{% if measures %}
## {{ "Beside its teacher" if teacher is not none else "Other measures" }}

{{ measures }}

Passkey: a number in a text is found again. Multikey: one of several numbers. Pairs: all of a list, asked in another
order. An answer counts where it would be generated.
{% endif %}

{% if schedules %}
{% set late = schedules[0].quality.late %}
## TransPoints

{{ schedule_table(schedules) }}

{% if teacher is not none %}
KL: from the teacher, nats per token; past {{ late }}: over tokens after so many of their document. Same top: the
fraction of tokens with the teacher's most likely next token.
{% endif %}
Attention: the fraction of tokens and layers that take it.
It, cache and times are those of one sequence of {{ schedules[0].cost.length | shown("{:,}") }} tokens in
{{ schedules[0].cost.dtype }} on {{ schedules[0].cost.device }}.
{% if schedules[0].longest is not none %}
The longest held-out document has {{ "{:,}".format(schedules[0].longest) }} tokens: quality says nothing of the
state-space form of a layer whose TransPoint is that or more.
{% endif %}
{% endif %}

{% if tokens %}
## Training

{% for stage, count in tokens.items() %}
- {{ stage }}: {{ "{:,}".format(count) }} tokens
{% endfor %}
{% endif %}

## Verification

Loaded in a fresh process with {{ library }} alone, in float32, its logits (largest
{{ "%.1f" | format(figures.scale) }}) differ from the trained student's by at most
{{ "%.1e" | format(figures.logits) }}, and decoding token by token from a cache
from the full forward pass by at most {{ "%.1e" | format(figures.decode) }}.
{% if costs %}
That is before its weights are quantised: {{ costs }} a token (KL from the trained student, on a text and a chat).
{% endif %}
{% if recipe %}

## Recipe

```yaml
{{ recipe }}
```
{% endif %}
"""
)
