"""The mutations of `python -m tests.mutations` still apply to the code."""

import pytest
from mutations import MUTATIONS, ROOT, places


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_text_to_replace_stands_in_one_place(mutation):
    assert len(places(ROOT, mutation)) == 1, mutation.old
    assert all(len(list((ROOT / "tests").rglob(f"{stem}.py"))) == 1 for stem in mutation.tests.split())
