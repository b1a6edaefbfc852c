"""Fixtures of the library's tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def no_gradients():
    """For tests that compare numbers and train nothing."""
    import torch

    with torch.no_grad():
        yield
