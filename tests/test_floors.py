"""The library's folders are floors: each imports those below it, and none above."""

import ast
from pathlib import Path

import jaxquant

FLOORS = ("clustering", "rounds", "packing", "calibration")
LIBRARY = Path(jaxquant.__file__).parent


def imported(path):
    """Return the modules of the library that a module imports, as paths of names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxquant."):
            yield tuple(node.module.split("."))
        if isinstance(node, ast.ImportFrom) and node.module == "jaxquant":
            yield from (("jaxquant", alias.name) for alias in node.names)


def test_no_floor_imports_one_above():
    modules = [path for floor in FLOORS for path in (LIBRARY / floor).rglob("*.py")]
    assert len(modules) > 20
    for path in modules:
        own = FLOORS.index(path.relative_to(LIBRARY).parts[0])
        for _, name, *_ in imported(path):
            assert name not in FLOORS[own + 1 :], f"{path} imports {name}"
            assert name != "product", f"{path} imports {name}"


def test_helpers_of_all_floors_import_none():
    for path in [*LIBRARY.glob("*.py"), *LIBRARY.glob("cpp/*.py")]:
        if path.name not in ("__init__.py", "product.py"):
            assert not {name for _, name, *_ in imported(path)} & {*FLOORS, "product"}, path


def test_the_library_never_imports_the_program():
    for path in LIBRARY.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [getattr(node, "module", None) or "", *(x.name for x in node.names)]
                assert not {name.split(".")[0] for name in names} & {"train", "tests"}, path
