"""Records in a notebook: tables of HTML, in which nothing of the user's is markup."""

import html

import pytest
from run_records import empty_record, run_record

from onebyone.core.tables import Table


def test_every_cell_is_in_the_html_as_text():
    table = Table(
        columns=("layer", ">MACs"), rows=[["<script>", "1 & 2"]], title="<b>", notes=["a < b"]
    )
    text = table.to_html()
    for cell in ("layer", "MACs", "<script>", "1 & 2", "<b>", "a < b"):
        assert html.escape(cell) in text
    assert "<script>" not in text
    assert text.count("<td") == 2
    assert 'style="text-align: right">1' in text


@pytest.mark.parametrize("part", ["plan", "comparison", "profile_before", None])
def test_a_record_shows_its_tables(part):
    record = run_record() if part is None else getattr(run_record(), part)
    text = record._repr_html_()
    assert text.count("<table>") == (2 if part is None else 1)
    assert html.escape(run_record().plan.choices[0].site) in text or part == "comparison"


def test_a_record_without_tables_shows_as_text():
    assert run_record().machine._repr_html_() is None
    assert empty_record("failed")._repr_html_() is None
