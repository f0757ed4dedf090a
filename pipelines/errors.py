"""What this package refuses."""


class PipelineError(Exception):
    """A model directory, device or component that cannot be used: one line naming where, what and the remedy."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def first_sentence(error: BaseException) -> str:
    """What an error of a library says first, on one line and without its full stop."""
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")
