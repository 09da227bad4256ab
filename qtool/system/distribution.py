"""The distribution: its name in package indexes, how its extras are installed, and the torch it was tested with."""

NAME = "qtool-llm"  # `qtool` in package indexes is another project
TESTED_TORCH = "2.13.0"  # the newest torch that all tests were run with


def install(extra: str = "") -> str:
    """Return the command that installs qtool, with what ``extra`` needs, one of the extras in pyproject.toml."""
    return f'pip install "{NAME}[{extra}]"' if extra else f"pip install {NAME}"
