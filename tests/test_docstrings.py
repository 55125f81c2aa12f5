"""Every public function and class says what it takes, returns and raises, and shows itself at work."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap

import pytest
from public_names import PUBLIC
from torch import nn

WITHOUT_EXAMPLE = {
    "seqdisent.ELBOTerms": "elbo_terms shows it",
    "seqdisent.chains.ChainState": "step shows it",
    "seqdisent.chains.ClassMarginals": "HiddenMarkovChain shows it",
    "seqdisent.chains.Filtered": "LinearGaussianChain shows it",
    "seqdisent.chains.FilteredClasses": "HiddenMarkovChain shows it",
    "seqdisent.chains.LinearEmission": "LinearGaussianChain shows it",
    "seqdisent.chains.Moments": "LinearGaussianChain shows it",
    "seqdisent.chains.Draw": "rsample_with_conditionals shows it",
    "seqdisent.datasets.Batch": "Sequences shows it",
    "seqdisent.datasets.SpriteRenderer": "needs the sheets",
    "seqdisent.datasets.jsb_chorales": "needs the chorales' file",
    "seqdisent.datasets.moving_mnist": "needs MNIST's files",
    "seqdisent.datasets.polyphonic_music": "needs a set's file",
    "seqdisent.datasets.sprites": "needs the sheets",
    "seqdisent.evaluation.Evaluation": "evaluate shows it",
    "seqdisent.inference.Imputed": "impute shows it",
    "seqdisent.inference.Inferred": "infer shows it",
    "seqdisent.inference.Term": "elbo_terms shows it",
    "seqdisent.metrics.CombinationScores": "combination_scores shows it",
    "seqdisent.metrics.ConsistencyScores": "AccuracyConsistency shows it",
    "seqdisent.metrics.CoverageScores": "IntervalCoverage shows it",
    "seqdisent.metrics.EntropyScores": "GenerationEntropies shows it",
    "seqdisent.metrics.FrechetScore": "FrechetDistance shows it",
    "seqdisent.metrics.GenerationScores": "generation_scores shows it",
    "seqdisent.metrics.MemorisationScores": "memorisation_scores shows it",
    "seqdisent.metrics.NeighbourScores": "neighbour_scores shows it",
    "seqdisent.metrics.ProbeScores": "probe shows it",
    "seqdisent.metrics.QuantileScores": "QuantileLoss shows it",
    "seqdisent.metrics.SampledSwapScores": "sampled_swap_accuracy shows it",
    "seqdisent.metrics.SwapScores": "SwapAccuracy shows it",
    "seqdisent.particles.Particles": "filter shows it",
    "seqdisent.load": "needs a trained model; the README shows it",
    "seqdisent.zoo.ZooModel": "the README shows it",
    "seqdisent.zoo.save": "needs a trained model; `pack` of the examples calls it",
    "seqdisent.training.CheckpointError": "fit raises it",
    "seqdisent.training.TrainerOptions": "fit takes them",
    "seqdisent.training.load_weights": "save_weights shows it",
    "seqdisent.training.ELBOTraining": "fit shows it",
    "seqdisent.training.Refit": "refit_priors shows it",
}


def is_from(thing, module_name):
    return (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__ == module_name


def public_methods(thing):
    """Return the documented functions that a class brings; what it overrides says for itself what it takes."""
    overridden = {name for base in thing.__mro__[1:] for name in vars(base)} - {"forward", "update", "compute"}
    for name, value in vars(thing).items():
        function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        if name[0] != "_" and inspect.isfunction(function) and name not in overridden:
            yield function


NAMES = {thing: name for name, thing in PUBLIC.items()}


def full_name(thing):
    return NAMES.get(thing, f"{thing.__module__}.{thing.__qualname__}")


CLASSES = [thing for thing in PUBLIC.values() if inspect.isclass(thing)]
FUNCTIONS = [thing for thing in PUBLIC.values() if inspect.isfunction(thing)]
METHODS = [(thing, method) for thing in CLASSES for method in public_methods(thing)]
BUILT_BY_USERS = [
    thing
    for thing in CLASSES
    if is_from(vars(thing).get("__init__"), thing.__module__) and not getattr(thing, "_is_protocol", False)
]
WITH_FIELDS = [thing for thing in CLASSES if hasattr(thing, "_fields") or hasattr(thing, "__dataclass_fields__")]

each_public = pytest.mark.parametrize("thing", PUBLIC.values(), ids=full_name)
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=full_name)
each_method = pytest.mark.parametrize(("owner", "method"), METHODS, ids=[full_name(method) for _, method in METHODS])


def section(docstring, title):
    """Return what is indented below `title:`."""
    found = re.search(rf"^{title}:\n((?: +.*\n|\n)*)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    return "" if found is None else textwrap.dedent(found[1])


def explained(docstring, title):
    return set(re.findall(r"^\*{0,2}(\w+):", section(docstring, title), re.MULTILINE))


def parameters(function):
    return {name for name in inspect.signature(function).parameters if name not in ("self", "cls") and name[0] != "_"}


def check_args(docstring, wanted, title="Args"):
    found = explained(docstring, title)
    assert found == wanted, f"{title}: lacks {sorted(wanted - found)}, and explains {sorted(found - wanted)} in vain"


@each_public
def test_an_example_that_doctest_runs(thing):
    methods = [method for owner, method in METHODS if owner is thing]
    shown = any(">>> " in (example.__doc__ or "") for example in (thing, *methods))
    listed = full_name(thing) in WITHOUT_EXAMPLE
    assert shown or listed, "has no Example"
    assert not (shown and listed), "has an Example: drop it from the list"


def test_only_public_names_are_let_off():
    assert set(WITHOUT_EXAMPLE) <= set(PUBLIC)


@each_function
def test_a_function_explains_its_parameters(function):
    check_args(function.__doc__, parameters(function))


@pytest.mark.parametrize("thing", BUILT_BY_USERS, ids=full_name)
def test_a_class_explains_its_parameters(thing):
    if thing in WITH_FIELDS:  # made for users, not by them
        check_args(thing.__doc__, parameters(thing), "Attributes")
    else:
        check_args(thing.__doc__, parameters(thing.__init__))


@pytest.mark.parametrize("thing", [t for t in WITH_FIELDS if hasattr(t, "_fields")], ids=full_name)
def test_a_named_tuple_explains_its_fields(thing):
    below_each = set(re.findall(r'^    (\w+): .+\n    r?"""', inspect.getsource(thing), re.MULTILINE))
    assert explained(thing.__doc__, "Attributes") | below_each == set(thing._fields)


@each_method
def test_a_method_names_its_parameters(owner, method):
    text = method.__doc__
    if method.__name__ in ("forward", "update"):
        text += section(owner.__doc__, "Shape")
    missing = {name for name in parameters(method) if not re.search(rf"\b{name}\b", text)}
    assert not missing
    assert explained(text, "Args") in (set(), parameters(method))


@pytest.mark.parametrize("thing", [thing for thing in CLASSES if "forward" in vars(thing)], ids=full_name)
def test_a_module_says_the_shapes_of_what_goes_in_and_out(thing):
    assert issubclass(thing, nn.Module)
    shapes = re.findall(r"^- (.+?): ", section(thing.__doc__, "Shape"), re.MULTILINE)
    assert {name for names in shapes for name in names.split(", ")} == {*parameters(thing.forward), "output"}


@each_function
def test_a_function_says_what_it_returns(function):
    if inspect.signature(function).return_annotation != "None":
        said = section(function.__doc__, "Returns") or re.search(
            r"^- [Oo]utput:", section(function.__doc__, "Shape"), re.M
        )
        assert said or re.search(r"\breturn", function.__doc__.split("\n\n")[0], re.IGNORECASE)


@each_function
def test_a_function_names_what_it_raises(function):
    assert raised(function) <= explained(function.__doc__, "Raises")


@pytest.mark.parametrize("thing", CLASSES, ids=full_name)
def test_a_class_names_what_it_raises(thing):
    said = explained(thing.__doc__, "Raises")
    methods = [method for owner, method in METHODS if owner is thing]
    methods += [thing.__init__] if thing in BUILT_BY_USERS and thing not in WITH_FIELDS else []
    for method in methods:
        missing = raised(method, thing) - said - explained(method.__doc__ or "", "Raises")
        assert not missing, method.__name__


@functools.cache
def raised(function, owner=None):
    """Return the exceptions that a function raises, itself or in what it calls of the package, as far as names tell."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            found.add((node.exc.func if isinstance(node.exc, ast.Call) else node.exc).id)
        called = getattr(node, "func", None)
        if isinstance(called, ast.Name):
            called = function.__globals__.get(called.id)
        elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "self":
            called = getattr(owner, called.attr, None)
        if inspect.isfunction(called) and called.__module__.split(".")[0] == "seqdisent" and called is not function:
            found |= raised(called, owner)
    return found
