"""What `hf_tpp` promises to its users: names, documentation, and errors that can be caught by kind."""

import inspect

import pytest

import hf_tpp
from hf_tpp import errors

NAMES = [
    "Channels",
    "ColumnParallelLinear",
    "Region",
    "RowParallelLinear",
    "TPPAccelerator",
    "TPPTrainer",
    "TPPTrainerMixin",
    "VocabParallelEmbedding",
    "clip_grad_norm_",
    "errors",
    "from_pretrained",
    "parallelize",
    "vocab_parallel_cross_entropy",
]
BASES = {
    "HfTppError": Exception,
    "ConfigurationError": (errors.HfTppError, ValueError),
    "AlreadyParallelError": errors.ConfigurationError,
    "UnsupportedModelError": (errors.HfTppError, ValueError),
    "RankMismatchError": (errors.HfTppError, RuntimeError),
    "BatchError": (errors.HfTppError, ValueError),
    "CheckpointError": (errors.HfTppError, ValueError),
    "ParityError": (errors.HfTppError, RuntimeError),
    "ScheduleError": (errors.HfTppError, RuntimeError),
}


def test_names():
    assert hf_tpp.__all__ == NAMES
    assert all(hasattr(hf_tpp, name) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_everything_public_has_a_docstring(name):
    text = inspect.getdoc(getattr(hf_tpp, name))
    assert text
    assert len(text.splitlines()[0]) > 20


def test_the_call_in_the_docstring_of_the_package():
    parameters = list(inspect.signature(hf_tpp.parallelize).parameters)
    assert parameters[:3] == ["model", "tp", "pp"]
    assert "model = parallelize(model, tp=2, pp=4)" in hf_tpp.__doc__


def test_every_error_is_listed():
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert defined == set(errors.__all__) == set(BASES)


@pytest.mark.parametrize("name", BASES)
def test_error_hierarchy(name):
    error = getattr(errors, name)
    bases = BASES[name] if isinstance(BASES[name], tuple) else (BASES[name],)
    assert error.__bases__ == bases
    assert inspect.getdoc(error)
    assert str(error("what is wrong")) == "what is wrong"
    assert name in errors.__doc__
