"""The surface: what `import stratakv` gives, and what it costs."""

import inspect
import json
import subprocess
import sys

import pytest

import stratakv

DOCUMENTED = [
    "Admission",
    "CacheManager",
    "ClosedError",
    "Codec",
    "Config",
    "ConfigError",
    "Discovery",
    "DragonflyConfig",
    "Explanation",
    "FoundModel",
    "Geometry",
    "GpuConfig",
    "GpuStats",
    "InputError",
    "Limits",
    "Match",
    "ModelCache",
    "ModelExistsError",
    "ModelNotFoundError",
    "ModelsConfig",
    "ObserveConfig",
    "PostgresConfig",
    "QdrantConfig",
    "Quota",
    "QuotasConfig",
    "RamConfig",
    "RefusedModel",
    "Snapshot",
    "SsdConfig",
    "Stats",
    "Status",
    "StoreConfig",
    "StoreError",
    "StoreFormatError",
    "StoreLockedError",
    "StrataKVError",
    "TierStats",
    "TokenSequence",
    "Usage",
    "__version__",
    "discover",
    "open",
    "weights_version",
]

THINGS = [each for each in DOCUMENTED if each != "__version__"]


def test_the_public_names_are_the_documented_ones() -> None:
    assert stratakv.__all__ == sorted(DOCUMENTED)


def test_nothing_else_looks_public() -> None:
    reachable = {
        name for name, value in vars(stratakv).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert reachable == set(THINGS)


@pytest.mark.parametrize("name", THINGS)
def test_every_public_name_says_what_it_is(name: str) -> None:
    thing = getattr(stratakv, name)
    assert inspect.getdoc(thing)
    assert thing.__doc__ != Exception.__doc__


@pytest.mark.parametrize("name", THINGS)
def test_every_public_name_belongs_to_the_package(name: str) -> None:
    assert getattr(stratakv, name).__module__.split(".")[0] == "stratakv"


@pytest.mark.parametrize("name", [each for each in THINGS if isinstance(getattr(stratakv, each, None), type)])
def test_every_public_method_says_what_it_does(name: str) -> None:
    methods = {
        attribute: value
        for attribute, value in vars(getattr(stratakv, name)).items()
        if not attribute.startswith("_") and (callable(value) or isinstance(value, property))
    }
    assert [attribute for attribute, value in methods.items() if not inspect.getdoc(value)] == []


@pytest.mark.parametrize("name", [each for each in THINGS if each.endswith("Error")])
def test_every_error_is_a_stratakv_error(name: str) -> None:
    assert issubclass(getattr(stratakv, name), stratakv.StrataKVError)


def test_the_version_is_the_crates() -> None:
    from importlib.metadata import version

    assert stratakv.__version__ == version("stratakv")


def fresh(program: str) -> list[str]:
    """Runs a program in a fresh interpreter, without the paths and hooks of this one; returns its JSON list."""
    ran = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    listed: list[str] = json.loads(ran.stdout)
    return listed


def test_import_brings_numpy_at_most() -> None:
    program = (
        "import json, sys; before = set(sys.modules); import stratakv;"
        "print(json.dumps(sorted({each.partition('.')[0] for each in set(sys.modules) - before})))"
    )
    brought = {each for each in fresh(program) if each not in sys.stdlib_module_names and not each.startswith("_")}
    assert brought <= {"numpy", "stratakv"}


def test_import_starts_no_thread_of_its_own() -> None:
    program = "import json, os, numpy, {}; print(json.dumps(os.listdir('/proc/self/task')))"
    assert len(fresh(program.format("stratakv"))) == len(fresh(program.format("sys")))
