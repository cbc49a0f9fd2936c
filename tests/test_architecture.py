"""What holds for the whole source tree, read from its syntax."""

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
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
    {"training"},
    {"planning"},
    {"serving", "pipelines", "measurement", "conversion"},
    {"auto"},
    {"models"},
    {"modeling"},
    {"grammar"},
    {"generation"},
    {"adapters"},
    {"quantization"},
    {"checkpoint"},
    {"parallel"},
    {"layers"},
    {"cache"},
    {"ops"},
    {"published"},
    {"triton"},
    {"kernels"},
    {"backends"},
    {"sharding"},
    {"parsing"},
    {"tokenization", "configuration"},
    {"hub"},
    {"sources"},
    {"download"},
    {"gguf"},
    {"folder"},
    {"files", "modeloutput"},
    {"errors"},
]
HEIGHT = {name: -rung for rung, names in enumerate(LADDER) for name in names}
FILES = sorted(SOURCE.rglob("*.py"))


def those(breaks: Callable[[Path], object], files: Iterable[Path] = FILES) -> dict[str, object]:
    """Return what breaks a rule, by file. One test for all: a case for each takes a minute."""
    found = {path.relative_to(SOURCE).as_posix(): breaks(path) for path in files}
    return {name: broken for name, broken in found.items() if broken}


def imported(tree: ast.AST) -> Iterator[str]:
    """Yield the dotted names a file imports, wherever in it; `from a import b` as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def names_in(path: Path) -> frozenset[str]:
    """Return the dotted names that a file imports."""
    return frozenset(imported(parsed(path)))


def roots_in(path: Path) -> set[str]:
    """Return the packages outside, and the library itself, that a file imports."""
    return {name.split(".")[0] for name in names_in(path)}


def packages(tree: ast.AST) -> set[str]:
    """Return the packages and modules right under quintet that a file imports."""
    return within(imported(tree))


def within(names: Iterable[str]) -> set[str]:
    """Return the packages and modules right under quintet among dotted names."""
    split = (name.split(".") for name in names)
    return {name[1] for name in split if name[0] == "quintet" and len(name) > 1}


def own(path: Path) -> str:
    """Return the package or module right under quintet that a file is of."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_every_package_has_a_rung() -> None:
    assert {own(path) for path in FILES} - {"__init__"} == set(HEIGHT)


def test_models_know_nothing_of_processes() -> None:
    """They say how they are cut, as data (`quintet.sharding`), and are hooked into."""
    known = ("quintet.parallel", "torch.distributed")
    models = [path for path in FILES if own(path) in ("models", "layers")]
    assert not those(lambda path: {n for n in names_in(path) if n.startswith(known)}, models)


# The root names what is public, and imports it lazily.
def test_imports_point_down_the_ladder() -> None:
    def upwards(path: Path) -> set[str]:
        here = own(path)
        below = {name for name in HEIGHT if HEIGHT[name] < HEIGHT[here]}
        return within(names_in(path)) - {here, "__version__"} - below

    assert not those(upwards, [path for path in FILES if path != SOURCE / "__init__.py"])


def module_of(path: Path) -> str:
    """Return the dotted name of a file; a package's is that of its `__init__`."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph(files: list[Path]) -> dict[str, set[str]]:
    """Return the modules that each module imports anywhere, by their dotted names."""
    known = {module_of(path): names_in(path) for path in files}

    def targets(names: Iterable[str]) -> Iterator[str]:
        for name in names:
            while name and name not in known:
                name = name.rpartition(".")[0]
            yield name

    # The root is everyone's parent, and imports the public names when they are first used.
    return {name: {*targets(names)} - {"", "quintet", name} for name, names in known.items()}


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


def test_families_do_not_import_each_other() -> None:
    families = [path for path in FILES if own(path) == "models"]
    assert not those(
        lambda path: {n for n in names_in(path) if n.startswith("quintet.models.")}, families
    )


# What the extra `serve` brings, itself or by what it needs.
SERVE = {"fastapi", "h11", "llguidance", "prometheus_client", "pydantic", "pydantic_core"}
SERVE |= {"starlette", "uvicorn"}
# What training takes of the extra `train`.
TRAIN = {"matplotlib", "plotext", "pyarrow"}
# What torch brings where it has CUDA.
CUDA = {"triton"}


def test_what_is_imported_is_what_is_declared() -> None:
    """Each dependency is used, and nothing else is; markupsafe is jinja2's own type of text."""
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    declared = {re.split(r"[<>=,]", one)[0] for one in project["project"]["dependencies"]}
    used = {name for path in FILES for name in roots_in(path)}
    outside = used - sys.stdlib_module_names - {"quintet", "markupsafe", "transformers", "lm_eval"}
    assert outside - SERVE - TRAIN - CUDA == declared


def test_only_the_server_and_grammars_import_what_is_optional() -> None:
    others = [path for path in FILES if own(path) not in {"server", "grammar"}]
    assert not those(lambda path: SERVE & roots_in(path), others)


def test_only_kernels_for_gpus_import_triton() -> None:
    others = [path for path in FILES if own(path) != "triton"]
    assert not those(lambda path: CUDA & roots_in(path), others)


OTHERS = {"transformers", "peft", "accelerate", "trl", "lm_eval"}


def at_import(tree: ast.Module) -> ast.Module:
    """Return a file without what runs only when a function is called."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return ast.Module([node for node in tree.body if not isinstance(node, kinds)], [])


def test_only_the_bridge_imports_tools_and_only_when_called() -> None:
    def tools(path: Path) -> set[str]:
        if own(path) != "interop":
            return OTHERS & roots_in(path)
        return OTHERS & {name.split(".")[0] for name in imported(at_import(parsed(path)))}

    assert not those(tools)


def test_nothing_needs_the_bridge() -> None:
    others = [path for path in FILES if own(path) != "interop"]
    assert not those(lambda path: {"interop"} & within(names_in(path)), others)


UNSAFE = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
EXECUTES = {"eval", "exec", "compile", "__import__", "torch.load", "yaml.load"}


def executed(tree: ast.AST) -> set[str]:
    """Return the calls in a file that run what they are given."""
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    plain = (f for f in calls if isinstance(f, ast.Name | ast.Attribute))
    return EXECUTES & {ast.unparse(f) for f in plain}


def test_nothing_read_is_executed() -> None:
    assert not those(lambda path: UNSAFE & roots_in(path) or executed(parsed(path)))


@pytest.mark.parametrize("text", ["eval(x)", "torch.load(path)", "f(yaml.load(x))", "[exec(x)]"])
def test_every_way_of_executing_is_seen(text: str) -> None:
    assert executed(ast.parse(text))


def test_a_file_is_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert not those(lambda path: lines[path] if lines[path] > 450 else 0)


def test_layers_take_scalars() -> None:
    def configs(path: Path) -> list[str]:
        names = (name for name in names_in(path) if name.startswith("quintet.configuration"))
        return [name for name in names if not name.startswith("quintet.configuration.rope.")]

    assert not those(configs, [path for path in FILES if own(path) == "layers"])


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
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full"),
    *("linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "range"),
    *("scalar_tensor", "tensor", "zeros", "Tensor", "FloatTensor"),
)


def undecided(tree: ast.AST) -> Iterator[str]:
    """Yield the calls that make a tensor and leave its dtype or its device to the defaults.

    A parameter, and a buffer that is one's own, have those of the model that is being built.
    """
    given: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name = ast.unparse(node.func)
            if name in {"nn.Parameter", "self.register_buffer"}:
                given.update(node.args)
            makes = name in {f"torch.{maker}" for maker in MAKERS} and node not in given
            if makes and not {"dtype", "device"} <= {word.arg for word in node.keywords}:
                yield ast.unparse(node)


def test_every_tensor_made_names_dtype_and_device() -> None:
    by_name = {f"torch.{name}" for name in MAKERS if name != "Tensor"}
    # Imported by name they would not be seen.
    assert not those(lambda path: [*undecided(parsed(path)), *by_name & names_in(path)])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("torch.zeros(3)", ["torch.zeros(3)"]),
        ("torch.full((3,), 1, dtype=d)", ["torch.full((3,), 1, dtype=d)"]),
        ("f(torch.arange(3, device=d))", ["torch.arange(3, device=d)"]),
        ("torch.empty(3, device=d, dtype=d)", []),
        ("nn.Parameter(torch.empty(3))", []),
        ("nn.Parameter(f(torch.empty(3)))", ["torch.empty(3)"]),
        ("x.new_empty(3), torch.empty_like(x)", []),
    ],
)
def test_every_way_of_leaving_it_open_is_seen(text: str, found: list[str]) -> None:
    assert list(undecided(ast.parse(text))) == found
