"""The house: who may import whom, no circles, and how much a folder and a file may hold."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST_MODULES, MOST_LINES, MOST_KERNEL_LINES = 15, 400, 500
TABLES = ()  # files that are one table, and may be longer

# From the top down; a module may import what stands in its own line or below (docs/architecture.md has it in words).
# A name stands for the module or package and all inside it that has no line of its own.
LAYERS = """
twinflow.__main__
twinflow.cli
twinflow.report
twinflow.train
twinflow.train.run twinflow.train.dry_run twinflow.train.restore
twinflow.train.callbacks twinflow.train.setup
twinflow.train.loop
twinflow.train.validation
twinflow.train.data
twinflow.train.model twinflow.train.checkpoint twinflow.train.logging
twinflow.train.signals
twinflow.train.config
twinflow.export twinflow.pipelines twinflow.memory.__init__
twinflow.memory.apply
twinflow.memory.planner.peers
twinflow.memory.planner
twinflow.memory.planner.simulation
twinflow.memory.planner.architectures twinflow.memory.planner.gpus twinflow.memory.planner.workload
twinflow.memory.modulation
twinflow.memory.offload
twinflow.memory
twinflow.lora
twinflow.models
twinflow.bridge twinflow.formats twinflow.teachers
twinflow.objective twinflow.conditioning
twinflow.scheduler
twinflow.sampling
twinflow.interface twinflow.adapters
twinflow
twinflow.atomic_files twinflow.distributed twinflow.suggest twinflow.environment
twinflow.errors
twinflow_kernels
"""
LAYER = {name: number for number, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}
PACKAGES = ("twinflow", "twinflow_kernels")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imports(module: str) -> Iterator[str]:
    """Modules that a module imports anywhere, in functions and for types alone, too."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
            for alias in node.names:  # a module of a package, or a name in a module
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in FILES else str(node.module)


IMPORTS = {module: sorted({other for other in imports(module) if other != module}) for module in FILES}


def layer(module: str) -> int:
    """The number of the longest name in `LAYERS` that a module lies in."""
    if FILES[module].name == "__init__.py" and f"{module}.__init__" in LAYER:
        return LAYER[f"{module}.__init__"]
    names = [module, *(module.rsplit(".", k)[0] for k in range(1, module.count(".") + 1))]
    return LAYER[next(name for name in names if name in LAYER)]


# The root's public names are imported when they are asked for; a package is imported before its modules anyway.
EDGES = [(a, b) for a, bs in IMPORTS.items() for b in bs if a != "twinflow" and not a.startswith(f"{b}.")]


def test_arrows_point_down():
    upward = [f"{a} -> {b}" for a, b in EDGES if layer(b) < layer(a)]
    assert upward == [], "these import from a higher layer"


def test_no_module_reaches_itself():
    graph: dict[str, set[str]] = {}
    for a, b in EDGES:
        graph.setdefault(a, set()).add(b)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_no_folder_reaches_itself():
    """Folders of one depth, such as `train.data` and `train.model`, have no circle either."""
    graph: dict[str, set[str]] = {}
    for a, b in EDGES:
        x, y = a.split("."), b.split(".")
        same = next((k for k, (p, q) in enumerate(zip(x, y, strict=False)) if p != q), None)
        if same is not None and FILES.keys() >= {a, b}:
            graph.setdefault(".".join(x[: same + 1]), set()).add(".".join(y[: same + 1]))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of folders: {' -> '.join(error.args[1])}")


def test_every_module_has_a_layer():
    known = [name for name in LAYER if name.removesuffix(".__init__") not in FILES]
    assert known == [], "layers of modules that are not there"
    assert all(layer(module) >= 0 for module in FILES)


def test_a_folder_holds_at_most_fifteen_modules():
    folders: dict[Path, int] = {}
    for module, path in FILES.items():
        folders[path.parent] = folders.get(path.parent, 0) + (path.name != "__init__.py")
        assert module  # named
    full = {str(folder.relative_to(ROOT)): n for folder, n in folders.items() if n > MOST_MODULES}
    assert full == {}


def test_a_file_holds_one_noun():
    long = {}
    for module, path in FILES.items():
        limit = MOST_KERNEL_LINES if module.startswith("twinflow_kernels") else MOST_LINES
        lines = path.read_text().count("\n")
        if lines > limit and module not in TABLES:
            long[module] = lines
    assert long == {}


def test_the_page_about_the_structure_names_what_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:twinflow|twinflow_kernels|tests|csrc)/[\w/.]+)`", page))
    assert len(named) > 15 and [path for path in sorted(named) if not (ROOT / path).exists()] == []
    tree = page.split("```")[1]
    folders = {path.parent.name for path in FILES.values() if path.parent.parts[-1] != "twinflow"}
    assert [name for name in sorted(folders) if f"{name}/" not in tree] == [], "folders that the tree leaves out"
    for name, path in re.findall(r"`(\w+)`[^`]*? in `([\w/]+\.py)`", page):
        assert re.search(rf"^(class |def )?{name}\b", (ROOT / path).read_text(), re.M), f"{name} in {path}"


def test_no_test_imports_a_test():
    """What several tests need stands in tests/helpers."""
    tests = ROOT / "tests"
    importers = {
        str(path.relative_to(tests))
        for path in tests.rglob("*.py")
        if re.search(r"^\s*(?:from|import) .*\btest_\w+", path.read_text(), re.MULTILINE)
    }
    assert importers == set()
