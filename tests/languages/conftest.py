from pathlib import Path

import pytest


@pytest.fixture
def cache(pytestconfig: pytest.Config) -> Path:
    """A folder that outlives the test run: the first build fetches and compiles for a minute or two."""
    return pytestconfig.cache.mkdir("languages")
