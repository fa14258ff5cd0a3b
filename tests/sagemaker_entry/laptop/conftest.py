"""The stubbed account of the laptop's tests."""

import pytest

from tests.sagemaker_entry.stubs import StubbedAccount


@pytest.fixture
def account():
    """An account whose clients answer what a test tells them; all answers must be asked for."""
    made = StubbedAccount()
    yield made
    made.assert_all_asked()
