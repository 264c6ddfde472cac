"""Each check that `make test-mutations` takes out is where it is looked for, and so is the test that must notice."""

import pytest

from mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_a_check_and_its_test_are_found(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    path, name = mutation.test.partition("[")[0].split("::")
    assert f"def {name}(" in (ROOT / path).read_text()
