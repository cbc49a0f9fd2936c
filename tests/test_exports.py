"""The public names, and that they cost nothing before they are used."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quintet
from waiting import PATIENCE

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "tokenizers", "huggingface_hub", "numpy", "jinja2")


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE
    )
    return done.stdout


def cli(*arguments: str, then: str = "") -> str:
    return (
        "import sys\n"
        "from quintet.cli.main import main\n"
        f"try: main({list(arguments)!r})\n"
        "except SystemExit as end: assert not end.code\n"
        f"{then}"
    )


def test_the_names_are_sorted_and_unique() -> None:
    assert quintet.__all__ == sorted(set(quintet.__all__))


@pytest.mark.parametrize("name", quintet.__all__)
def test_every_name_is_importable(name: str) -> None:
    assert getattr(quintet, name) is not None
    assert name in dir(quintet)


def test_a_name_is_the_one_its_module_exports() -> None:
    for name, module in quintet._MODULE_OF.items():
        found = importlib.import_module(module)
        assert getattr(quintet, name) is getattr(found, name)
        assert name in found.__all__


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'quintet' has no attribute 'AutoModle'"):
        quintet.AutoModle  # noqa: B018


def test_what_type_checkers_see_is_what_is_loaded() -> None:
    tree = ast.parse(Path(quintet.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert all(alias.asname == alias.name for node in imports for alias in node.names)
    assert seen == quintet._MODULE_OF
    assert {*seen, "__version__"} == set(quintet.__all__)


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import quintet, sys", id="import"),
        pytest.param("import sys\nfrom quintet import QuintetError, demo_model", id="light-names"),
        pytest.param(cli("--help"), id="help"),
        pytest.param(cli("--version"), id="version"),
        pytest.param(cli("generate", "--help"), id="generate-help"),
        pytest.param(cli("chat", "--help"), id="chat-help"),
        pytest.param(cli("info", "--help"), id="info-help"),
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    loaded = run(f"{code}\nprint('loaded:', *sys.modules)").rpartition("loaded:")[2].split()
    assert "quintet" in loaded
    assert not set(HEAVY) & set(loaded)


def test_a_config_needs_no_torch() -> None:
    code = "import sys\nfrom quintet import AutoConfig, GenerationConfig\nprint(*sys.modules)"
    assert "torch" not in run(code).split()


@pytest.mark.parametrize(
    ("code", "most"),
    [
        pytest.param("import quintet", 40, id="import"),
        pytest.param(cli("--help"), 110, id="help"),
        pytest.param(cli("generate", "--help"), 150, id="generate-help"),
    ],
)
def test_few_modules_are_imported_at_the_start(code: str, most: int) -> None:
    count = "\nimport sys\nprint('modules:', len(sys.modules))"
    bare, modules = (int(run(c + count).rpartition(":")[2]) for c in ("pass", code))
    assert modules - bare <= most


def test_the_types_are_published() -> None:
    assert (Path(quintet.__file__).parent / "py.typed").is_file()


def test_the_version_is_told() -> None:
    assert all(part.isdigit() for part in quintet.__version__.split("."))
    script = Path(sys.executable).with_name("quintet")
    if not os.access(script, os.X_OK):
        pytest.skip("the package is not installed")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"quintet {quintet.__version__}\n"
