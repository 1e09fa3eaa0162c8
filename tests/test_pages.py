"""The pages: their links, the width of their lines, and the numbers of a real model in README."""
import itertools
import re
import sys

import pytest

from tests.models import ROOT

sys.path.insert(0, str(ROOT / "findings"))
import real_tables

COURSE = sorted(ROOT.glob("course/**/*.md"))
PAGES = [ROOT / "README.md", *COURSE, *ROOT.glob("findings/*.md"), *ROOT.glob("bench/*.md")]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TRAINING = "engine/settings.py", "em_rl.py"  # which define flags of other scripts, too


def anchors(page):
    """Where a link with a # can lead: the headings, as GitHub names them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        found.add(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_a_file_and_a_heading(page):
    """Guards against links that a move of files or a new heading leaves behind."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_the_workflow_has_no_command_but_ci_run_and_readme_s():
    """It can't be tried here: guards against a typo in it, and commands that only it has."""
    yaml = pytest.importorskip("yaml", reason="comes with transformers")
    text = (ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"].values()
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    ci_run = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert len(commands) == len(jobs) == 2 and "://" not in text
    for command in commands:
        assert command == ".ci/run" or command in readme
        assert command == ".ci/run" or set(command.split(" && ")) <= set(ci_run)
    for job in jobs:
        assert job["strategy"]["matrix"]["python"][0] == "3.10"  # as text: 3.10 would be 3.1
        assert {"actions/checkout", "actions/setup-python"} == {
            step["uses"].partition("@")[0] for step in job["steps"] if "uses" in step
        }


def test_pages_that_messages_name_are_there():
    for file in ROOT.glob("[a-z]*/*.py"):
        text = file.read_text(encoding="utf-8")
        for name in re.findall(r"\b(?:course|findings|bench)/\w+\.md", text):
            assert (ROOT / name).exists(), f"{file}: {name}"


@pytest.mark.parametrize("page", PAGES[: 1 + len(COURSE)], ids=NAMES[: 1 + len(COURSE)])
def test_a_page_fits_an_editor(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    outside = [line for line in lines if not line.startswith("|")]
    too_wide = [line for line in outside if len(line) > 100 and "://" not in line]
    assert not too_wide
    if page == ROOT / "README.md":
        assert len(outside) <= 130, "it is what most people read: put it on another page"


def flags_of(page):
    """(script, flag) of each command in a page's code, be it a block or a part of a line."""
    text = re.sub(r"\\\n *", "", page.read_text(encoding="utf-8"))
    blocks = re.compile(r"^```\w*\n(.*?)^```", re.M | re.S)
    codes = blocks.findall(text) + re.findall(r"`([^`]+)`", blocks.sub("", text))
    for code in codes:
        line = code if code.endswith("\n") else code.replace("\n", " ")
        for script, rest in re.findall(r"([\w/]+\.py)\b([^\n#|;&]*)", line):
            for flag in re.findall(r"(?<= )--[a-z][\w-]*", rest):
                yield script, flag


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_have_flags_that_their_scripts_know(page):
    """Guards against flags that were renamed, and commands that nobody typed."""
    for script, flag in flags_of(page):
        sources = [script, "engine/load.py"]
        if script in ("em_rl.py", "em_ft.py", "scale/em_rl_fsdp.py"):
            sources += TRAINING
        if script == "scale/em_rl_fsdp.py":
            sources.append("scale/vllm_rollouts.py")
        known = {"--help"}
        for source in sources:
            text = (ROOT / source).read_text(encoding="utf-8")
            known |= set(re.findall(r'\w\(\s*"(--[\w-]+)"', text))
        assert flag.replace("--no-", "--") in known, f"{script} {flag}"


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
            itertools.product(sets.split(", "), real_tables.PLAIN), cells, strict=True
        ):
            some = found(rows, model, name, where, how)
            assert cell == (real_tables.shown(some, "accuracy") or cell), (name, where, how)
            assert some or cell in ("", "not measured"), (name, where, how)
    assert table.count("%") >= 8


def test_the_course_has_the_numbers_of_the_findings():
    rows = real_tables.read_table(ROOT / "findings/real.csv")
    text = (ROOT / "course/README.md").read_text(encoding="utf-8")
    assert real_tables.filled(text, rows) == text and text.count("|accuracy-->") == 3
    (paragraph,) = re.findall(r"^\*\*SmolLM2.*?\n\n", text, re.M | re.S)
    numbers = re.findall(r"\d+\.\d", paragraph)
    page = (ROOT / "findings/smollm2.md").read_text(encoding="utf-8")
    assert len(numbers) == 7 and all(f"| {number} %" in page for number in numbers)


def found(rows, model, name, where, how):
    """The rows of the CSV that stand behind a cell of README's table, those of all seeds."""
    if name == "base":
        return real_tables.find(rows, model, "", where, how)
    if "," not in name:
        decoder = name.partition(" (")[0].lower().replace(" ", "-") + "@1"
        return real_tables.find(rows, model, "", where, decoder) if how == "sample@1" else []
    return real_tables.find(rows, model, name, where, how)
