"""One matrix for all tests of the ranks: checkpoints are written, and the oracle is evaluated, once."""

import pytest

from tests.ranks.matrix import Matrix


@pytest.fixture(scope="session")
def matrix(tmp_path_factory):
    return Matrix(tmp_path_factory.mktemp("matrix"))
