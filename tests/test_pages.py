"""The pages: their links, the width of their lines, and the numbers of a real model in README."""
import itertools
import re
import sys

import pytest

from tests.models import ROOT

sys.path.insert(0, str(ROOT / "findings"))
import real_tables

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/*.md"))]
PLAIN = ["README.md", "course/README.md", "course/others.md"]  # read as they are, not only rendered


def anchors(page):
    """Where a link with a # can lead: the headings, as GitHub names them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_a_file_and_a_heading(page):
    """Guards against links that a move of files or a new heading leaves behind."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


@pytest.mark.parametrize("name", PLAIN)
def test_a_page_fits_an_editor(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    outside = [line for line in lines if not line.startswith("|")]
    too_wide = [line for line in outside if len(line) > 100 and "://" not in line]
    assert not too_wide
    if name == "README.md":
        assert len(outside) <= 130, "it is what most people read: put it on another page"


def test_readme_s_real_model_has_the_numbers_of_the_csv():
    """A row is the base model, a decoder of em_inf.py at T = 1 or, as in "EM-FT, asdiv", what was
    trained and on which set. Guards against numbers that stay when the CSV is measured anew."""
    rows = real_tables.read_table(ROOT / "findings/real.csv")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pattern = r"<!-- findings/real.csv, (.*): (.*) -->\n\|.*\n\|[-|]*\n((?:\|.*\n)*)"
    model, sets, table = re.search(pattern, text).groups()
    for line in table.splitlines():
        name, _, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        for (where, how), cell in zip(
            itertools.product(sets.split(", "), real_tables.BASE), cells, strict=True
        ):
            some = found(rows, model, name, where, how)
            assert cell == (real_tables.shown(some, "accuracy") or cell), (name, where, how)
            assert some or cell in ("", real_tables.UNKNOWN), (name, where, how)
    assert table.count("%") >= 8


def found(rows, model, name, where, how):
    """The rows of the CSV that stand behind a cell of README's table, those of all seeds."""
    if name == "base":
        return real_tables.find(rows, model, "", where, how)
    if "," not in name:
        decoder = name.lower().replace(" ", "-") + "@1"
        return real_tables.find(rows, model, "", where, decoder) if how == "sample@1" else []
    runs = sorted({key[1] for key in rows if key[1].rpartition(", ")[0] == name})
    return [row for run in runs for row in real_tables.find(rows, model, run, where, how)]
