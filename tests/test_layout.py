"""The layout: the method does not need experiments/, no circle, no private imports, 100 columns."""
import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
METHOD = sorted(ROOT.glob("*.py"))
FOLDERS = [ROOT / name for name in ("experiments", "benchmarks", "tests")]
FILES = METHOD + [file for folder in FOLDERS for file in sorted(folder.rglob("*.py"))]


def module_name(file: Path) -> str:
    """The name to import a file by: model, experiments.world, conftest."""
    folder = ROOT / "tests" if file.is_relative_to(ROOT / "tests") else ROOT
    return ".".join(file.relative_to(folder).with_suffix("").parts)


TREES = {module_name(file): ast.parse(file.read_text()) for file in FILES}
PROJECT = {*TREES, "experiments", "benchmarks"}


def imports(nodes) -> dict[str, str]:
    """Names of the project that import statements bind: {local name: full name}."""
    names = {}
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names
                      if alias.name in PROJECT}
        elif isinstance(node, ast.ImportFrom) and node.module in PROJECT:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}"
                      for alias in node.names}
    return names


def imported_modules(name: str) -> set[str]:
    """Modules of the project that a module imports at module level, not inside a function."""
    full_names = imports(TREES[name].body).values()
    return {full if full in PROJECT else full.rpartition(".")[0] for full in full_names}


def test_the_method_does_not_import_experiments():
    for file in METHOD:
        packages = {name.split(".")[0] for name in imported_modules(module_name(file))}
        assert not packages & {"experiments", "benchmarks"}, file


def test_imports_make_no_circle():
    graphlib.TopologicalSorter({name: imported_modules(name) for name in TREES}).prepare()


def test_no_file_uses_a_private_name_of_another():
    for name, tree in TREES.items():
        names = imports(ast.walk(tree))
        attributes = {node.attr for node in ast.walk(tree)
                      if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                      and names.get(node.value.id) in PROJECT}
        used = attributes | {full.rpartition(".")[2] for full in names.values()}
        private = [x for x in used if x.startswith("_") and not x.startswith("__")]
        assert not private, name


def test_no_line_is_wider_than_100_columns():
    wide = [f"{file.relative_to(ROOT)}:{number}" for file in FILES
            for number, line in enumerate(file.read_text().splitlines(), start=1)
            if len(line) > 100]
    assert not wide
