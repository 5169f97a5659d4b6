"""The rules of the repository that no linter checks on its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = [ROOT / "hf_tpp", ROOT / "conversion" / "hf_tpp_conversion"]
MAX_LINES = 400


def test_import_contracts_are_kept():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()", "--no-cache"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'conversion'}"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_files_are_short():
    lengths = {
        path.relative_to(ROOT): len(path.read_text().splitlines())
        for package in PACKAGES
        for path in package.rglob("*.py")
    }
    assert lengths
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_every_folder_is_a_package():
    folders = {path.parent for package in PACKAGES for path in package.rglob("*.py")} | set(PACKAGES)
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()] == []
