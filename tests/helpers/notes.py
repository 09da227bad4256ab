"""A sink that collects notes."""

from qtool.system import progress


class Notes(progress.Sink):
    """Collects the notes, and what else is said, of whatever runs while it is in use."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.said: list[str] = []

    def note(self, message: str) -> None:
        self.texts.append(message)

    def say(self, message: str) -> None:
        self.said.append(message)
