"""What holds for the whole source tree, read from its syntax."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "quintet"
# From the top down; what stands together does not import each other.
LADDER = [
    {"__main__"},
    {"cli"},
    {"interop"},
    {"exporting"},
    {"server"},
    {"serving", "pipelines", "measurement", "conversion"},
    {"auto"},
    {"models"},
    {"modeling"},
    {"grammar"},
    {"generation"},
    {"adapters"},
    {"quantization"},
    {"checkpoint"},
    {"layers"},
    {"cache"},
    {"ops"},
    {"kernels"},
    {"backends"},
    {"parsing"},
    {"tokenization", "configuration"},
    {"hub"},
    {"sources"},
    {"download"},
    {"gguf"},
    {"files", "folder", "modeloutput"},
    {"errors"},
]
HEIGHT = {name: -rung for rung, names in enumerate(LADDER) for name in names}
FILES = sorted(SOURCE.rglob("*.py"))


def each_of(files: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "path", files, ids=lambda path: path.relative_to(SOURCE).as_posix()
    )


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names a file imports, wherever in it; `from a import b` as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(tree: ast.AST) -> set[str]:
    """Return the packages and modules right under quintet that a file imports."""
    names = (name.split(".") for name in imported(tree))
    return {name[1] for name in names if name[0] == "quintet" and len(name) > 1}


def own(path: Path) -> str:
    """Return the package or module right under quintet that a file is of."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_every_package_has_a_rung() -> None:
    assert {own(path) for path in FILES} - {"__init__"} == set(HEIGHT)


# The root names what is public, and imports it lazily.
@each_of([path for path in FILES if path != SOURCE / "__init__.py"])
def test_imports_point_down_the_ladder(path: Path) -> None:
    here = own(path)
    below = {name for name in HEIGHT if HEIGHT[name] < HEIGHT[here]}
    assert packages(parsed(path)) - {here, "__version__"} <= below


def module_of(path: Path) -> str:
    """Return the dotted name of a file; a package's is that of its `__init__`."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph(files: list[Path]) -> dict[str, set[str]]:
    """Return the modules that each module imports anywhere, by their dotted names."""
    known = {module_of(path): parsed(path) for path in files}

    def targets(tree: ast.AST) -> Iterator[str]:
        for name in imported(tree):
            while name and name not in known:
                name = name.rpartition(".")[0]
            yield name

    # The root is everyone's parent, and imports the public names when they are first used.
    return {name: {*targets(tree)} - {"", "quintet", name} for name, tree in known.items()}


def circles(imports: dict[str, set[str]]) -> set[str]:
    """Return the modules that import each other in a circle, and those that lead to one."""
    left = dict(imports)
    while leaves := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in leaves:
            del left[name]
    return set(left)


# Imports for types alone count: what can only be described by each other is one thing.
def test_no_module_imports_in_a_circle() -> None:
    assert circles(graph([path for path in FILES if path != SOURCE / "__init__.py"])) == set()


@pytest.mark.parametrize(
    ("imports", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, set()),
        ({"a": {"b"}, "b": {"a"}, "c": set()}, {"a", "b"}),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, {"a", "b", "c"}),
    ],
)
def test_every_circle_is_seen(imports: dict[str, set[str]], found: set[str]) -> None:
    assert circles(imports) == found


@each_of([path for path in FILES if own(path) == "models"])
def test_families_do_not_import_each_other(path: Path) -> None:
    families = {name for name in imported(parsed(path)) if name.startswith("quintet.models.")}
    assert not families


# What the extra `serve` brings, itself or by what it needs.
SERVE = {"fastapi", "h11", "llguidance", "prometheus_client", "pydantic", "pydantic_core"}
SERVE |= {"starlette", "uvicorn"}


def test_what_is_imported_is_what_is_declared() -> None:
    """Each dependency is used, and nothing else is; markupsafe is jinja2's own type of text."""
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    declared = {re.split(r"[<>=,]", one)[0] for one in project["project"]["dependencies"]}
    used = {name.split(".")[0] for path in FILES for name in imported(parsed(path))}
    outside = used - sys.stdlib_module_names - {"quintet", "markupsafe", "transformers", "lm_eval"}
    assert outside - SERVE == declared


@each_of([path for path in FILES if own(path) not in {"server", "grammar"}])
def test_only_the_server_and_grammars_import_what_is_optional(path: Path) -> None:
    assert not SERVE & {name.split(".")[0] for name in imported(parsed(path))}


OTHERS = {"transformers", "peft", "accelerate", "trl", "lm_eval"}


def at_import(tree: ast.Module) -> ast.Module:
    """Return a file without what runs only when a function is called."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return ast.Module([node for node in tree.body if not isinstance(node, kinds)], [])


@each_of(FILES)
def test_only_the_bridge_imports_tools_and_only_when_called(path: Path) -> None:
    tree = at_import(parsed(path)) if own(path) == "interop" else parsed(path)
    assert not OTHERS & {name.split(".")[0] for name in imported(tree)}


@each_of([path for path in FILES if own(path) != "interop"])
def test_nothing_needs_the_bridge(path: Path) -> None:
    assert "interop" not in packages(parsed(path))


@each_of(FILES)
def test_nothing_read_is_executed(path: Path) -> None:
    tree = parsed(path)
    modules = {name.split(".")[0] for name in imported(tree)}
    assert not modules & {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load"}


@each_of(FILES)
def test_a_file_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 450


@each_of([path for path in FILES if own(path) == "layers"])
def test_layers_take_scalars(path: Path) -> None:
    names = set(imported(parsed(path)))
    configs = {name for name in names if name.startswith("quintet.configuration")}
    assert all(name.startswith("quintet.configuration.rope.") for name in configs)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import quintet.auto", {"auto"}),
        ("from quintet import cache, auto", {"cache", "auto"}),
        ("def f():\n    from quintet.ops.rope import x", {"ops"}),
        ("if TYPE_CHECKING:\n    from quintet.cli.main import main", {"cli"}),
    ],
)
def test_every_way_of_importing_is_seen(text: str, found: set[str]) -> None:
    assert packages(ast.parse(text)) == found


# What makes a tensor of nothing but numbers takes the defaults of whoever calls.
MAKERS = (
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "frombuffer", "full"),
    *("linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "range"),
    *("scalar_tensor", "tensor", "zeros", "Tensor", "FloatTensor"),
)


def undecided(tree: ast.AST) -> Iterator[str]:
    """Yield the calls that make a tensor and leave its dtype or its device to the defaults."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            makes = ast.unparse(node.func) in {f"torch.{name}" for name in MAKERS}
            if makes and not {"dtype", "device"} <= {word.arg for word in node.keywords}:
                yield ast.unparse(node)


@each_of([path for path in FILES if own(path) in {"kernels", "ops", "cache"}])
def test_every_tensor_made_names_dtype_and_device(path: Path) -> None:
    assert list(undecided(parsed(path))) == []
    # Imported by name they would not be seen.
    assert not {f"torch.{name}" for name in MAKERS if name != "Tensor"} & set(
        imported(parsed(path))
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("torch.zeros(3)", ["torch.zeros(3)"]),
        ("torch.full((3,), 1, dtype=d)", ["torch.full((3,), 1, dtype=d)"]),
        ("f(torch.arange(3, device=d))", ["torch.arange(3, device=d)"]),
        ("torch.empty(3, device=d, dtype=d)", []),
        ("x.new_empty(3), torch.empty_like(x)", []),
    ],
)
def test_every_way_of_leaving_it_open_is_seen(text: str, found: list[str]) -> None:
    assert list(undecided(ast.parse(text))) == found
