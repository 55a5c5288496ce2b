"""What decoders of several versions of transformers hand to a mixer, and what they forget to."""

import inspect
import os
import pickle
import sys
from importlib.metadata import requires

import pytest
import torch
import transformers
from packaging.requirements import Requirement

import fresh
from transpoint.students import HybridCache, HybridForCausalLM
from transpoint.students.modeling.configuration_hybrid import OLDEST

pytestmark = pytest.mark.stack

MIXERS = ("mamba2", "transmamba", "window_mamba2", "window_gdn", "gdn", "mamba1", "s4d", "softmax")


@pytest.fixture(params=MIXERS)
def student(request, make_student):
    return make_student(mixer=request.param).eval()


def tokens(length=12):
    return torch.arange(3, 3 + length)[None]


def mixer_of(student):
    return next(mixer for mixer in student.mixer_layers() if mixer is not None)


def handing_on(layer, change):
    """Has a layer call its mixer with keywords that `change` has changed."""
    mixer, own = layer.self_attn, layer.self_attn.forward
    mixer.forward = lambda *args, **kwargs: own(*args, **change(kwargs))


@torch.no_grad()
def test_a_cache_is_taken_by_either_name(student):
    found = []
    for name in ("cache", "past_key_values"):
        cache = student.new_cache()
        student(tokens(), **{name: cache})
        found.append(student(tokens(1), **{name: cache}).logits)
    assert torch.equal(*found)
    assert not torch.allclose(found[0], student(tokens(1)).logits, atol=1e-3)  # it is read


@torch.no_grad()
def test_a_mixer_refuses_a_keyword_that_it_does_not_know(student):
    mixer = mixer_of(student)
    hidden = torch.randn(1, 5, student.config.hidden_size)
    rotary = student.get_decoder().rotary_emb(hidden, torch.arange(5)[None])
    expected = mixer(hidden, rotary)[0]
    for name in ("is_causal", "memory", "cu_seq_lens_q"):
        with pytest.raises(TypeError, match=f"layer {mixer.layer_idx} is a mixer.*'{name}'"):
            mixer(hidden, rotary, **{name: torch.ones(1)})
        assert torch.equal(mixer(hidden, rotary, **{name: None})[0], expected)
    harmless = {"position_ids": torch.arange(5)[None], "use_cache": False, "output_attentions": True}
    assert torch.equal(mixer(hidden, rotary, **harmless)[0], expected)


@torch.no_grad()
def test_a_cache_that_layers_hand_on_by_another_name_is_an_error(student):
    for layer in student.get_decoder().layers:
        handing_on(layer, lambda kwargs: {"memory" if "cache" in k or "past" in k else k: v for k, v in kwargs.items()})
    with pytest.raises(TypeError, match="does not know the keyword 'memory'"):
        student(tokens(), use_cache=True)


@torch.no_grad()
def test_a_cache_that_a_layer_does_not_hand_on_is_an_error(student):
    mixer = mixer_of(student)
    handing_on(
        student.get_decoder().layers[mixer.layer_idx],
        lambda kwargs: {name: value for name, value in kwargs.items() if not isinstance(value, HybridCache)},
    )
    student(tokens(), use_cache=False)
    with pytest.raises(RuntimeError, match="hands its layers no cache, though one is in use"):
        student(tokens(), use_cache=True)


@torch.no_grad()
def test_a_decoder_that_hands_on_no_keywords_is_an_error(student, monkeypatch):
    layer_class = type(student.get_decoder().layers[0])
    known, own = inspect.signature(layer_class.forward).parameters, layer_class.__call__

    def call(self, *args, **kwargs):
        return own(self, *args, **{name: value for name, value in kwargs.items() if name in known})

    monkeypatch.setattr(layer_class, "__call__", call)
    with pytest.raises(RuntimeError, match="hands its layers no keywords"):
        student(tokens(), use_cache=False)


@pytest.mark.slow
def test_students_go_through_pickle_to_another_process(make_student, tmp_path):
    students = [make_student(mixer=mixer).eval() for mixer in MIXERS]
    with torch.no_grad():
        logits = [student(tokens()).logits for student in students]
    assert pickle.loads(pickle.dumps(type(students[0]))) is type(students[0])
    configs = [student.config for student in students]
    torch.save({"students": students, "logits": logits, "configs": configs}, tmp_path / "students.pt")
    script = (
        "import sys, torch\n"
        "found = torch.load(sys.argv[1], weights_only=False)\n"
        "for student, logits, config in zip(found['students'], found['logits'], found['configs'], strict=True):\n"
        "    assert type(student.config) is type(config) and type(student).__name__ == 'HybridForCausalLM'\n"
        "    assert torch.equal(student(torch.arange(3, 15)[None]).logits, logits)\n"
    )
    command = [sys.executable, "-c", script, tmp_path / "students.pt"]
    fresh.run(command, cwd=tmp_path, env=os.environ).check_returncode()


def test_the_oldest_supported_transformers_is_the_one_that_the_package_asks_for():
    required = next(one for one in map(Requirement, requires("transpoint")) if one.name == "transformers")
    assert str(required.specifier) == f">={OLDEST}"


def test_an_older_transformers_is_refused_in_one_line(tmp_path):
    script = (
        "import transformers\n"
        "transformers.__version__ = '5.16.1'\n"
        "try:\n"
        "    from transpoint.students import HybridForCausalLM\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = fresh.run([sys.executable, "-c", script], cwd=tmp_path, env=os.environ)
    assert done.stdout.strip() == (
        f"a Transpoint student needs transformers {OLDEST} or later, this is 5.16.1: `pip install -U transformers`"
    )


@torch.no_grad()
def test_a_loaded_student_checks_its_cache_too(make_student, tmp_path):
    make_student().save_pretrained(tmp_path)
    student = HybridForCausalLM.from_pretrained(tmp_path)
    prefill = student(tokens(), use_cache=True)
    cache = prefill["cache" if "cache" in prefill else "past_key_values"]
    step = student(tokens(13)[:, -1:], cache=cache).logits
    torch.testing.assert_close(step, student(tokens(13)).logits[:, -1:], atol=1e-5, rtol=1e-4)
    assert transformers.__version__ >= OLDEST
