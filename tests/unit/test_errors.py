"""What an optional package that is not there, or not whole, leads to."""

import pytest

from llfast import MissingDependencyError
from llfast.errors import needed


def test_a_package_that_is_not_there_is_asked_for_with_its_command():
    with (
        pytest.raises(MissingDependencyError, match="^run pip install x$"),
        needed("no_such_package", "run pip install x"),
    ):
        import no_such_package.part  # noqa: F401


def test_what_another_package_lacks_is_its_own_trouble():
    with (
        pytest.raises(ModuleNotFoundError, match="no_such_package"),
        needed("scipy", "run pip install scipy"),
    ):
        import no_such_package  # noqa: F401
