"""The config of a hybrid student: its teacher's config, flat, and what sits in each layer.

This file travels with exported checkpoints: it imports transformers only.
"""

import inspect
import json
import re
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from packaging.version import Version

OLDEST = "5.17"  # version of transformers that students are tested with
if Version(transformers.__version__) < Version(OLDEST):
    raise ImportError(
        f"a Transpoint student needs transformers {OLDEST} or later, this is {transformers.__version__}: "
        "`pip install -U transformers`"
    )

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig  # noqa: E402

from .configuration_mixers import MIXERS, have_trans_points, names_with_trans_points  # noqa: E402
from .configuration_transmamba import fixed_point, parse_trans_points, written  # noqa: E402
from .errors import StudentError  # noqa: E402

MODEL_TYPE = "transpoint_hybrid"
# What a checkpoint needs that carries its own code, and how transformers finds it there.
AUTO_MAP = {
    "AutoConfig": "configuration_hybrid.HybridConfig",
    "AutoModelForCausalLM": "modeling_hybrid.HybridForCausalLM",
}


class HybridConfig(PreTrainedConfig):
    """Every field of the teacher's config, and seven of ours.

    Fields:
        base_model_type: the teacher's `model_type` ("llama"): whose module tree the student is.
        mixers: for each layer what replaces self-attention, a name in `MIXERS`, or "attention" where it is kept, as it
            is in all of them by default.
        mixer_options: keyword arguments of the mixer's class.
        other_options: the same of further kinds of mixers, by name, that do not have these; None where there are none.
        geometry: of the attention that was there, as `Geometry` has it, and under "layers" what is other in single
            ones. None in students of earlier versions, which read it off the model.
        trans_points: for each layer its TransPoint, a number of tokens or "inf"; "inf" where attention is kept, 0 in a
            layer without one. None for a student that has none at all. Change it with `set_trans_points`.
        measured_trans_points: what is known of this student under some schedules, each {"trans_points": as above,
            "trained": whether it was trained on them, "quality": figures by name, or None}, and "schedule": its name,
            if it has one, "longest": the tokens of the longest document it was measured on, "cost".
        scratch_seed: of a model without a teacher, trained from scratch, the seed of its first weights; else None.

    `HybridConfig(base_model_type=..., ...)`, `from_dict` and `from_pretrained` give an instance of a class that is
    both this one and the teacher's config class.
    """

    model_type = MODEL_TYPE

    base_model_type: str | None = None
    mixers: list[str] = None  # type: ignore[assignment]  # known with the number of layers
    mixer_options: dict = None  # type: ignore[assignment]
    other_options: dict[str, dict] | None = None
    geometry: dict | None = None
    trans_points: Any = None
    measured_trans_points: list[dict] | None = None
    scratch_seed: int | None = None

    def __new__(cls, *args, base_model_type: str | None = None, **kwargs):
        return super().__new__(hybrid_config_class(base_model_type) if cls is HybridConfig else cls)

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.mixers = ["attention"] * self.num_hidden_layers if self.mixers is None else self.mixers
        self.mixer_options = {} if self.mixer_options is None else self.mixer_options
        if len(self.mixers) != self.num_hidden_layers:
            raise ValueError(f"mixers names {len(self.mixers)} layers, the model has {self.num_hidden_layers}")
        if have_trans_points(self.mixers):
            self.set_trans_points(self.trans_points, warn=False)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        if cls is HybridConfig:
            return hybrid_config_class(config_dict.get("base_model_type")).from_dict(config_dict, **kwargs)
        trans_points = kwargs.pop("trans_points", None)  # asked for in from_pretrained, of a model or a config
        loaded = super().from_dict(config_dict, **kwargs)
        if trans_points is not None:
            (loaded[0] if isinstance(loaded, tuple) else loaded).set_trans_points(trans_points)
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """As `PreTrainedConfig.save_pretrained`; the code goes along where there is an `auto_map`, as in an export."""
        # Where this file itself came with a checkpoint, transformers copies the code.
        if getattr(self, "auto_map", None) and __name__.startswith("transpoint."):
            self.auto_map = AUTO_MAP
            write_code(Path(save_directory), self.mixers)
        super().save_pretrained(save_directory, *args, **kwargs)

    def set_trans_points(self, spec: Any, warn: bool = True) -> list[int | float]:
        """Chooses the TransPoints; returns them, one for each layer, and infinity as `math.inf`.

        Args:
            spec: as in `parse_trans_points`. What it says of layers that have no choice is left out.
            warn: whether to warn, with what was measured, of TransPoints that the student was not trained on.

        Raises:
            StudentError: spec is malformed, or no layer has a choice.
        """
        if not have_trans_points(self.mixers):
            raise StudentError(
                f"this student has no {names_with_trans_points()} layers, so there are no TransPoints to set"
            )
        points = parse_trans_points(spec, len(self.mixers), getattr(self, "max_position_embeddings", None))
        points = [fixed_point(mixer, point) for mixer, point in zip(self.mixers, points, strict=True)]
        if warn and written(points) != self.trans_points:
            self._warn_of(written(points))
        self.trans_points = written(points)
        return points

    def options_of(self, mixer: str) -> dict:
        """Keyword arguments of the class of a kind of mixer."""
        return (self.other_options or {}).get(mixer, self.mixer_options)

    @property
    def attention_name(self) -> str:
        """What a layer calls its attention."""
        return (self.geometry or {}).get("attribute", "self_attn")

    def layer_geometry(self, layer: int) -> dict | None:
        """Of the attention that was in a layer, what `Geometry` takes; None where it is not known."""
        if self.geometry is None:
            return None
        own = self.geometry.get("layers", {}).get(str(layer), {})
        return {name: value for name, value in (self.geometry | own).items() if name != "layers"}

    def set_geometry(self, layers: list[dict]) -> None:
        """Takes down that of all layers."""
        layers = json.loads(json.dumps(layers))  # as it will be loaded
        others = {
            str(layer): {name: value for name, value in facts.items() if value != layers[0][name]}
            for layer, facts in enumerate(layers)
        }
        others = {layer: facts for layer, facts in others.items() if facts}
        self.geometry = layers[0] | ({"layers": others} if others else {})

    def _warn_of(self, trans_points: list[int | str]) -> None:
        """Warns where records of measurements do not say that the student was trained on these TransPoints."""
        records = self.measured_trans_points or []
        same = next((record for record in records if record["trans_points"] == trans_points), {})
        if same.get("trained"):
            return
        trained = [record for record in records if record.get("trained")]
        text = f"this student was not trained on TransPoints {_name(same or {'trans_points': trans_points})}"
        text += f": {_figures(same)}" if same.get("quality") else ", and nothing was measured with them"
        for record in trained:
            text += f"; trained on {_name(record)}: {_figures(record)}"
        warnings.warn(text, UserWarning, stacklevel=3)


def write_code(folder: Path, mixers: Iterable[str]) -> None:
    """Writes the code of a student to a folder: the config, the model, its mixers, and what these import.

    transformers finds out by the imports that a file has which others it needs, so the mixers stand there.

    Raises StudentError where a mixer of somebody else's lies in a file that has the name of one of the project's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {name: MIXERS[name] for name in mixers if name != "attention"}
    classes = {name: kind.load() for name, kind in kinds.items()}
    sources = {Path(inspect.getfile(one)) for one in classes.values()}
    wanted = [Path(__file__), Path(__file__).with_name("modeling_hybrid.py"), *sorted(sources)]
    homes = [Path(__file__).parent, Path(__file__).parents[2] / "kernels"]
    written: dict[str, Path] = {}
    while wanted:
        path = wanted.pop()
        if written.get(path.name, path) != path:
            raise StudentError(f"the file of a mixer, {path}, has the name of one of the project's: rename it")
        if path.name not in written:
            written[path.name] = path
            shutil.copyfile(path, folder / path.name)
            for name in re.findall(r"^ *from \.([\w.]*) import", path.read_text(encoding="utf-8"), re.MULTILINE):
                # Beside the file that asks for it first: a name of ours there would be another file.
                places = [home / f"{name}.py" for home in (path.parent, *homes)]
                found = next((place for place in places if place.exists()), None)
                if found is None:
                    raise StudentError(f"{path} imports .{name}, and only files beside it can travel: put it there")
                wanted.append(found)
    lines = ["", "", "# The mixers of this checkpoint.", "from .configuration_mixers import MIXERS, MixerKind  # noqa"]
    for name, mixer in classes.items():
        lines.append(f"from .{Path(inspect.getfile(mixer)).stem} import {mixer.__name__}  # noqa")
        facts = f"{kinds[name].title!r}, {kinds[name].letter!r}, {mixer.__name__}"
        flags = f"trans_points={kinds[name].trans_points}, attention={kinds[name].attention}"
        lines.append(f"MIXERS[{name!r}] = MixerKind({facts}, {flags})")
    with (folder / "modeling_hybrid.py").open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def _name(record: dict) -> str:
    """The TransPoints of a record for people: one entry where all layers are alike, else the schedule's name."""
    points = record["trans_points"]
    return f"{points[0]} in every layer" if len(set(points)) == 1 else record.get("schedule") or str(points)


def _figures(record: dict) -> str:
    quality = {name: value for name, value in (record.get("quality") or {}).items() if isinstance(value, float)}
    if not quality:
        return "unmeasured"
    text = ", ".join(f"{name} {value:.4g}" for name, value in quality.items())
    # No TransPoint from there on was passed by what it was measured on.
    return text + (f" (documents of at most {record['longest']} tokens)" if record.get("longest") else "")


def hybrid_config_class(base_model_type: str | None) -> type[HybridConfig]:
    """The class that is both a `HybridConfig` and the config of `base_model_type` (one class for each type).

    Raises:
        ValueError: transformers has no such model type.
    """
    if base_model_type not in _CLASSES:
        if base_model_type is None or base_model_type not in CONFIG_MAPPING:
            raise ValueError(f"base_model_type '{base_model_type}' is not a model type of this transformers version")
        # The name is the public one: saved checkpoints refer to it. The other is what pickle looks up, see below.
        names = {"__module__": __name__, "__qualname__": f"HybridConfig:{base_model_type}"}
        fields = {"model_type": MODEL_TYPE, **names}
        _CLASSES[base_model_type] = type("HybridConfig", (HybridConfig, CONFIG_MAPPING[base_model_type]), fields)
    return _CLASSES[base_model_type]


def __getattr__(name: str) -> type:
    """The class of a pickled config, in a process that has not made it yet."""
    word, _, base_model_type = name.partition(":")
    if word != "HybridConfig" or not base_model_type:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return hybrid_config_class(base_model_type)


_CLASSES: dict[str, type[HybridConfig]] = {}

if __name__.startswith("transpoint."):  # elsewhere a checkpoint's `auto_map` says it
    AutoConfig.register(MODEL_TYPE, HybridConfig, exist_ok=True)
