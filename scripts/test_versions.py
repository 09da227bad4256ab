"""Run a part of the tests with the oldest and with the newest supported versions of packages that change often.

    python scripts/test_versions.py [--only oldest|newest] [--tests tests/cli/test_main.py ...]

Supported is what pyproject.toml allows. The packages are installed without their dependencies into folders that stand
first on PYTHONPATH; all else, torch included, is that of this Python. Ends with 0 if every run passed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGES = ("transformers", "compressed-tensors", "typer")
TESTS = (  # models of every family, loading, exports, KV caches and the command line
    "tests/models/test_contract.py",
    "tests/models/test_cache_argument.py",
    "tests/models/test_kv_cache.py",
    "tests/checkpoints/test_native.py",
    "tests/checkpoints/test_transformers_hook.py",
    "tests/exporters/test_contract.py",
    "tests/cli/test_main.py",
    "tests/test_surface.py",
)
SHOW = "import importlib.metadata as m, sys; print(*(f'{p} {m.version(p)}' for p in sys.argv[1:]), sep=', ')"


def supported() -> Iterator[Requirement]:
    """Yield the requirement of each of ``PACKAGES`` in pyproject.toml, as users or as the tests install it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    every = [Requirement(row) for row in (*project["dependencies"], *project["optional-dependencies"]["test"])]
    for name in PACKAGES:
        yield next(each for each in every if each.name == name)


def asked(requirement: Requirement, age: str) -> str:
    """Return what pip is asked for: the lower bound itself if ``age`` is oldest, else the newest within the bounds."""
    if age == "newest":
        return str(requirement)
    lowest = next(each.version for each in requirement.specifier if each.operator == ">=")
    return f"{requirement.name}=={lowest}"


def run(age: str, tests: list[str]) -> int:
    """Install the packages of one ``age``, run the tests with them, and return pytest's exit status."""
    wanted = [asked(each, age) for each in supported()]
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", folder, *wanted], check=True)
        path = os.pathsep.join([folder, str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        environment = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)}
        found = subprocess.run(
            [sys.executable, "-c", SHOW, *PACKAGES], env=environment, check=True, capture_output=True, text=True
        )
        print(f"{age}: {found.stdout.strip()}", flush=True)
        pytest = [sys.executable, "-m", "pytest", "-q", "--no-showlocals", "-p", "no:cacheprovider", *tests]
        return subprocess.run(pytest, cwd=ROOT, env=environment).returncode


def main() -> int:
    """Run the tests for each age, and say which failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("oldest", "newest"))
    parser.add_argument("--tests", nargs="+", default=list(TESTS))
    args = parser.parse_args()
    failed = [age for age in ([args.only] if args.only else ["oldest", "newest"]) if run(age, args.tests) != 0]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
