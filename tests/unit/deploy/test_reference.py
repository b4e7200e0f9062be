"""The configuration reference is what the tree says, and says something of every setting."""

from __future__ import annotations

from ellm.deploy import reference
from ellm.deploy.tree import TYPES, EllmConfig


def settings() -> dict[str, str]:
    """Every setting of the page, and what it says of it."""
    found = {}
    for path, cls in reference.sections(EllmConfig, ""):
        found.update({leaf: text for leaf, _, _, text in reference.leaves(cls, path)})
    return found


def test_the_page_is_up_to_date() -> None:
    made = "python -m ellm.deploy.reference makes it anew"
    assert reference.PAGE.read_text() == reference.page(), made


def test_every_setting_is_there_and_says_what_it_is() -> None:
    assert set(settings()) == set(TYPES)
    assert [path for path, text in settings().items() if not text] == []


def test_nothing_is_said_twice_or_of_a_setting_that_is_not_there() -> None:
    comments = {
        f"{path}{name}"
        for path, cls in reference.sections(EllmConfig, "")
        for name, text in reference.field_comments(cls).items()
        if text
    }
    assert set(reference.meanings()) <= set(TYPES)
    assert set(reference.meanings()) & comments == set()


def test_a_row_has_the_type_the_bounds_the_default_and_the_short_name() -> None:
    rows = reference.page().splitlines()
    (row,) = (line for line in rows if line.startswith("| `worker.cache.num_blocks`"))
    assert row == (
        "| `worker.cache.num_blocks`<br>short: `kv_blocks` | an integer or null, 2 to 2,147,483,648 | `null`"
        " | null: sized from memory |"
    )
