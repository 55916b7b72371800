"""What an install delivers, what an import loads, and which way imports may point."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import hf_logits


ROOT = Path(__file__).parents[1]
FOLDERS = ("processors", "trainers")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))
CORE = sorted(path for path in (ROOT / "hf_logits").rglob("*.py") if path.relative_to(ROOT).parts[1] not in FOLDERS)


def run_python(code: str, *, cwd: Path, isolated: bool = False) -> list[str]:
    """Run `code` in a fresh interpreter and return the words that it prints."""
    command = [sys.executable, *(["-I"] if isolated else []), "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def imported_modules(path: Path) -> set[str]:
    """Everything that a file imports, also inside its functions, by full name; relative imports keep their dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def reaches(path: Path, *roots: str) -> set[str]:
    """The imports of `path` that are one of `roots` or lie below it."""
    return {name for name in imported_modules(path) if any(f"{name}.".startswith(f"{root}.") for root in roots)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that a bare copy of the checkout builds, unpacked: `(names in the archive, folder that holds them)`."""
    tmp = tmp_path_factory.mktemp("wheel")
    checkout = tmp / "checkout"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("hf_logits", *FOLDERS):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp / "dist", checkout]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (tmp / "dist").glob("*.whl")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp / "site")
        return set(opened.namelist()), tmp / "site"


def test_every_folder_with_code_is_a_listed_package():
    packages = {
        Path(folder).relative_to(ROOT).as_posix().replace("/", ".")
        for folder, _, files in os.walk(ROOT / "hf_logits", followlinks=True)
        if "__init__.py" in files
    }
    assert packages == set(SETUPTOOLS["packages"])


def test_the_two_folders_are_mapped_and_linked():
    assert SETUPTOOLS["package-dir"] == {f"hf_logits.{folder}": folder for folder in FOLDERS}
    for folder in FOLDERS:
        assert os.readlink(ROOT / "hf_logits" / folder) == f"../{folder}"


def test_the_wheel_holds_every_file_at_its_installed_place(wheel):
    names, _ = wheel
    expected = {f"hf_logits/{path.relative_to(ROOT)}" for path in SOURCES} | {"hf_logits/py.typed"}
    expected |= {str(path.relative_to(ROOT)) for path in CORE}
    assert expected == {name for name in names if name.startswith("hf_logits/")}


def test_the_wheel_has_one_top_level_name(wheel):
    names, _ = wheel
    assert {name.split("/")[0] for name in names} == {"hf_logits", f"hf_logits-{hf_logits.__version__}.dist-info"}


def test_the_wheel_imports_from_elsewhere_and_leaves_the_bare_names_alone(wheel, tmp_path):
    _, site = wheel
    code = f"""
import sys; sys.path.insert(0, {str(site)!r})
import importlib.util, hf_logits.processors, hf_logits.trainers
print(hf_logits.__file__, hf_logits.processors.__file__, hf_logits.trainers.__file__)
print(*(importlib.util.find_spec(name) for name in {FOLDERS!r}))
"""
    *files, first, second = run_python(code, cwd=tmp_path, isolated=True)
    assert [Path(file).parent for file in files] == [site / "hf_logits", *(site / "hf_logits" / f for f in FOLDERS)]
    assert (first, second) == ("None", "None")


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("hf_logits", {"torch", "transformers", "peft", "trl", "evaluate", "datasets", "numpy"}),
        ("hf_logits.processors", {"trl", "evaluate", "datasets"}),
    ],
)
def test_an_import_loads_no_more_than_it_needs(module, unwanted):
    loaded = run_python(f"import sys, {module}; print(*sys.modules)", cwd=ROOT)
    assert module in loaded
    assert not unwanted & set(loaded)


def test_every_public_name_resolves():
    assert set(hf_logits.__all__) <= set(dir(hf_logits))
    for name in dir(hf_logits):
        getattr(hf_logits, name)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Steer'"):
        _ = hf_logits.Steer


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_method_imports_the_core_and_no_other_method(path):
    others = {"processors", "trainers", "hf_logits.processors", "hf_logits.trainers"}
    if path.name == "__init__.py":  # it lists the methods of its own folder
        others.remove(f"hf_logits.{path.parent.name}")
    assert not reaches(path, *others)
    assert not {name for name in imported_modules(path) if name.startswith(".")}


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_knows_no_method(path):
    assert not reaches(path, "processors", "trainers", "hf_logits.processors", "hf_logits.trainers")


@pytest.mark.parametrize("path", sorted((ROOT / "processors").glob("*.py")), ids=lambda path: path.name)
def test_a_processor_fits_on_a_few_screens(path):
    assert len(path.read_text().splitlines()) <= 260
