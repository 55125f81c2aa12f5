"""The tests on the versions at both ends of what is supported: `nox`, or one session of it, `nox -s lowest`.

What comes after `--` goes to pytest: `nox -s newest -- tests/test_elbo.py`. docs/reliability.md has the results. Where
pip takes a CUDA build of PyTorch, a session takes several GB.
"""

import nox

nox.options.default_venv_backend = "venv"

# the lower bounds of pyproject.toml, at their first release
LOWEST = (
    "torch==2.4.0",
    "pyro-ppl==1.9.0",
    "antialiased-cnns==0.3",
    "typing-extensions==4.8.0",
    "numpy==1.26.0",
    "lightning==2.6.0",
    "tensorboard==2.14.0",
    "matplotlib==3.8.0",
    "pillow==10.0.0",
    "torchmetrics==1.6.0",
    "scikit-learn==1.4.0",
    "tqdm==4.66.0",
    "jsonargparse==4.41.0",
    "safetensors==0.4.3",
    "hypothesis==6.100.0",
    "pytest==8.2.0",
)


def run_tests(session: nox.Session) -> None:
    """Run the fast tests; warnings differ from release to release, so they are shown, not errors."""
    versions = "import sys, torch, pyro; print(sys.version.split()[0], torch.__version__, pyro.__version__)"
    session.run("python", "-c", versions)
    session.run("pytest", "-m", "not slow", "-W", "default", *(session.posargs or ["tests"]), env={"CI": "1"})


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """The oldest Python, and the lower bound of every dependency."""
    session.install(*LOWEST, ".[test]")
    run_tests(session)


@nox.session(python="3.11")
def pinned(session: nox.Session) -> None:
    """The exact versions of constraints.txt."""
    session.install("-c", "constraints.txt", ".[test]")
    run_tests(session)


@nox.session(python=["3.11", "3.12", "3.13"])
def newest(session: nox.Session) -> None:
    """The newest release of every dependency that the Python at hand can install."""
    session.install("--upgrade", ".[test]")
    run_tests(session)
