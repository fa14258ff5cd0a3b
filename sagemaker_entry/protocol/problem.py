"""An error of a job or a launch that the user can correct."""

from dino_lightning.errors import UserError


class Problem(UserError):
    """Something that the user can correct; the message is one sentence that says what and how."""
