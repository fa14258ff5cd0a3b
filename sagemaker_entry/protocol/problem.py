"""The error whose message is meant for the user."""


class Problem(Exception):
    """Something the user has to change; the message is one sentence that says what and how."""
