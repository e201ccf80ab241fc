"""The wheel installs jaxemo and nothing else at top level, with its data, and works from another directory."""

import pathlib
import subprocess
import sys
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parent.parent

SCRIPT = """
import sys
import jaxemo, jaxemo.kernels, jaxemo.checkpoints
from jaxemo.emotions import corpus
assert {site!r} in jaxemo.__file__ and {site!r} in jaxemo.kernels.__file__ and {site!r} in jaxemo.checkpoints.__file__
assert len(corpus.shipped().stories) == 2052 and corpus.leak("happy", "She was happy.") == "happy"
import importlib.resources
assert "<html" in (importlib.resources.files("jaxemo.report") / "base.html").read_text()
heavy = {{"torch", "transformers", "transformer_lens", "nnsight"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob("*.whl"))


def test_the_wheel_holds_one_top_level_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"jaxemo"}
    for expected in (
        "jaxemo/kernels/project/reference.py",
        "jaxemo/checkpoints/gguf.py",
        "jaxemo/emotions/data/stories.jsonl",
        "jaxemo/report/demo.html",
        "jaxemo/py.typed",
    ):
        assert expected in names
    sources = {str(p.relative_to(ROOT)) for d in ("jaxemo", "kernels", "checkpoints") for p in (ROOT / d).rglob("*.py")}
    packaged = {
        n.removeprefix("jaxemo/") if n.startswith(("jaxemo/kernels", "jaxemo/checkpoints")) else n for n in names
    }
    assert sources <= packaged, f"not in the wheel: {sorted(sources - packaged)}"


def test_the_installed_wheel_imports_from_elsewhere(wheel, tmp_path):
    """In an environment of its own, which borrows the dependencies installed here but not the project."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    )
    site = purelib.strip()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, str(wheel)], check=True
    )
    borrowed = subprocess.check_output([sys.executable, "-c", "import numpy; print(numpy.__path__[0])"], text=True)
    # A .pth beside it would also bring the editable project's own hook; a plain path entry does not run .pth files.
    pathlib.Path(site, "borrowed.pth").write_text(str(pathlib.Path(borrowed.strip()).parent) + "\n")
    done = subprocess.run([python, "-c", SCRIPT.format(site=site)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(p.name for p in pathlib.Path(site).iterdir() if p.is_dir() and "dist-info" not in p.name) in (
        ["bin", "jaxemo"],
        ["jaxemo"],
    )
