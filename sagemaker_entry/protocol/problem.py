"""The error that the entry points print as one sentence, without a traceback."""

from dino_lightning.errors import UserError


class Problem(UserError):
    """Something in the job or the account that the user can correct; the message says what is wrong and what to do."""
