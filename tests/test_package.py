"""What wheel and sdist carry, and that chiasm runs from the wheel alone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"


def _run(*command: str | Path) -> str:
    """Run what ends by itself, without this checkout on its path; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def _files() -> set[str]:
    return {
        str(file.relative_to(SOURCE))
        for file in (SOURCE / "chiasm").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_the_wheel_has_the_whole_package_and_nothing_else(wheel: Path) -> None:
    carried = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    assert {name for name in carried if ".dist-info/" not in name} == _files()
    assert {"chiasm/py.typed", "chiasm/checkpoints/demo/model.safetensors"} <= carried


def test_the_sdist_has_what_the_wheel_is_built_from_and_no_tests(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as opened:
        carried = {name.partition("/")[2] for name in opened.getnames()}
    assert {f"src/{name}" for name in _files()} <= carried
    others = {name for name in carried if not name.startswith("src/chiasm/")}
    assert others == {"README.md", "LICENSE", "pyproject.toml", "PKG-INFO", ".gitignore"}


def test_chiasm_demo_runs_from_the_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """Dependencies are those of this environment, which isn't searched for chiasm: its .pth files don't count there."""
    environment = tmp_path / "environment"
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    _run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel)
    place = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (place / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    assert Path(_run(python, "-c", "import chiasm; print(chiasm.__file__)").strip()).is_relative_to(place)
    assert "first token after" in _run(environment / "bin" / "chiasm", "demo")  # it fails if an answer is wrong
