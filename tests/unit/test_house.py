"""The house rules that a machine can keep: budgets, names, lazy imports, the public surface, heavy libraries in their rooms."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import metamorph

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "metamorph"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py", "misc.py", "util.py", "helper.py"}

# library -> the rooms or files that may import it, relative to src/metamorph
OWNERS = {
    "diffusers": ("decoder/",),
    "datasets": ("data/",),
    "av": ("data/decoding.py",),
    "matplotlib": ("reporting/",),
    "wandb": ("training/trackers.py",),
    "tensorboard": ("training/trackers.py",),
    "trackio": ("training/trackers.py",),
    "gradio": ("serving/",),
    "fastapi": ("serving/",),
    "uvicorn": ("serving/",),
    "ray": ("serving/",),
    "lmms_eval": ("evaluation/",),
    "torchvision": (),
    "pickle": (),
    "accelerate": (),
}

PUBLIC = {
    "Example",
    "ImagePart",
    "Message",
    "MetaMorph",
    "MetaMorphConfig",
    "MetaMorphError",
    "MetaMorphPipeline",
    "MetaMorphProcessor",
    "RunConfig",
    "TextPart",
    "VideoPart",
    "VisualDecoderPipeline",
    "__version__",
}


def python_files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout.strip()


def imported_libraries(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def function_lengths(tree: ast.Module) -> dict[str, int]:
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {f"{node.name}:{node.lineno}": (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}


def test_files_and_functions_keep_their_budgets():
    over = []
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        place, lines = path.relative_to(ROOT), len(text.splitlines())
        if lines > MAX_FILE_LINES:
            over.append(f"{place}: {lines} lines, at most {MAX_FILE_LINES}")
        over += [f"{place}:{name}: {n} lines" for name, n in function_lengths(ast.parse(text)).items() if n > MAX_FUNCTION_LINES]
    assert not over, "\n".join(over)


def test_no_file_is_a_drawer_for_everything():
    assert not [str(path.relative_to(ROOT)) for path in python_files() if path.name in FORBIDDEN_NAMES]


def test_every_room_and_file_says_what_it_is():
    silent = [str(path.relative_to(ROOT)) for path in python_files() if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert not silent, f"no module docstring: {silent}"


def test_heavy_libraries_stay_in_their_rooms():
    strays = []
    for path in python_files():
        place = path.relative_to(SOURCE).as_posix()
        for library in imported_libraries(ast.parse(path.read_text(encoding="utf-8"))) & OWNERS.keys():
            if not place.startswith(OWNERS[library] or ("nowhere",)):
                strays.append(f"{place} imports {library}, which belongs to {OWNERS[library] or 'nobody'}")
    assert not strays, "\n".join(strays)


def test_torchvision_is_not_installed():
    """Beside a CPU build of torch it breaks transformers and diffusers, and it silently changes how images are resized."""
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("torchvision")


# What begins with an underscore are hooks of the interpreter's site.
THIRD_PARTY = "print(*sorted({m.partition('.')[0] for m in sys.modules if m[0] != '_'} - sys.stdlib_module_names), file=sys.stderr)"


def loaded_libraries(code: str) -> set[str]:
    """What is loaded beside the standard library after some code has run in a fresh interpreter."""
    command = [sys.executable, "-c", f"import sys\n{code}\n{THIRD_PARTY}"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stderr.split())


def test_importing_the_package_loads_nothing_else():
    assert loaded_libraries("import metamorph") == {"metamorph"}


def test_messages_and_reporting_load_without_torch():
    code = "import sys, metamorph.messages, metamorph.reporting.page; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    assert not {"torch", "transformers", "diffusers", "matplotlib"} & set(run_python(code).split())


def test_command_help_loads_typer_and_nothing_heavier():
    code = "from metamorph.cli.main import main\nsys.argv = ['metamorph', '--help']\ntry: main()\nexcept SystemExit: pass"
    assert loaded_libraries(code) <= {"metamorph", "typer", "click", "shellingham", "annotated_doc", "typing_extensions", "colorama"}


def test_model_trains_where_optional_libraries_are_missing():
    """Rooms that every run needs load without the libraries that only one room owns."""
    code = (
        "import sys\n"
        "for name in ('diffusers', 'matplotlib', 'av', 'datasets', 'wandb', 'torchvision'): sys.modules[name] = None\n"
        "import metamorph.model, metamorph.data, metamorph.training, metamorph.recipes, metamorph.pipeline, metamorph.cli.main\n"
    )
    run_python(code)


def test_public_surface_is_frozen():
    """A name added here is a promise; a name removed breaks someone."""
    assert set(metamorph.__all__) == PUBLIC
    assert set(dir(metamorph)) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_name_resolves(name: str):
    assert getattr(metamorph, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'MetaMorf'"):
        metamorph.MetaMorf  # noqa: B018


def test_version_is_that_of_the_installed_package():
    assert importlib.metadata.version("metamorph") == metamorph.__version__


def test_every_tracked_text_names_no_machine_path():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    suffixes = {".py", ".md", ".toml", ".json", ".yaml", ".yml", ".txt", ".cff", ""}
    homes = ("/ho" + "me/", "/wo" + "rk/", "/tm" + "p/", "/ro" + "ot/", "/User" + "s/")
    found = [
        f"{name} names {home}"
        for name in tracked
        if Path(name).suffix in suffixes and (ROOT / name).is_file()
        for home in homes
        if home in (ROOT / name).read_text(encoding="utf-8", errors="ignore")
    ]
    assert not found, "\n".join(found)
