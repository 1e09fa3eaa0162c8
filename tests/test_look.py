"""The page that shows entropy token by token, and the same in a terminal."""
import html.parser
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.models import ROOT, TINY_BASE

sys.path.insert(0, str(ROOT / "course"))
import look

import em_inf
from engine.run import write_rows
from engine.sampler import generate
from entropy import output_head, score_all
from tasks.problems import load_problems
from tasks.prompts import encode_prompt, stop_ids

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
NASTY = '<script>alert("a")</script>\n  żółw & 🐢 \x00\u202e${0}</p>'


class Page(html.parser.HTMLParser):
    """A page's tags, checked for being closed in order, and the tokens of each response."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.tokens, self.marks = [], [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"
        found = re.search(r"^const \{ names, rows \} = (.*)$", text, re.MULTILINE)
        self.data = json.loads(found[1])

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "p" and "main" in self.open and dict(attributes).get("class") == "tokens":
            self.tokens.append([])
            self.marks.append([])
        if tag != "meta":
            self.open.append(tag)
        if self.open[-2:] in (["p", "span"], ["p", "ins"]) and "main" in self.open:
            self.tokens[-1].append("")
            self.marks[-1].append((tag, dict(attributes)["class"]))

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] in (["span"], ["ins"]) and "main" in self.open:
            self.tokens[-1][-1] += data


def make(path, *flags):
    look.main([*map(str, flags), "--out", str(path)])
    return Page(path.read_text(encoding="utf-8"))


def say(tokenizer, text, spread=3.0):
    """A stand-in for `generate` that says this text, from random logits."""
    ids = tokenizer(text)["input_ids"] if isinstance(text, str) else text

    def spoken(model, prompts, stop, max_new_tokens, temperature, sharpen):
        for _ in ids:
            sharpen(spread * torch.randn(1, model.config.vocab_size))
        return SimpleNamespace(responses=[ids])

    return spoken


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two problems, and a descent so steep that Proposition 1 can be seen."""
    flags = "--limit 2 --seed 1 --optimizer sgd --lr 20".split()
    return make(tmp_path_factory.mktemp("look") / "page.html", *flags)


def test_every_token_stands_there_with_the_numbers_of_score_all(page, tiny):
    """The numbers could be those of the token before, of T != 1, or of what EM-INF made."""
    model, tokenizer = tiny
    head = output_head(model, encode_prompt(tokenizer, "?"))
    for i, problem in enumerate(load_problems(em_inf.TINY["data"])[:2]):
        for k, sharpen in enumerate([None, em_inf.EMInf(lr=20, optimizer="sgd").sharpen]):
            prompt = encode_prompt(tokenizer, problem["prompt"])
            torch.manual_seed(1)
            (ids,) = generate(
                model, [prompt], stop_ids(model, tokenizer), 64, 1.0, sharpen=sharpen
            ).responses
            assert "".join(page.tokens[2 * i + k]) == tokenizer.decode(ids)
            rows = page.data["rows"][2 * i + k]
            entropy, logprobs, _ = score_all(model, head, [prompt], [ids])
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            for t, row in enumerate(rows):
                assert row[1] == pytest.approx(entropy[0, t].item(), abs=1e-4)
                assert row[2] == pytest.approx(logprobs[0, t].item(), abs=1e-4)
                p, likeliest = logits[t].softmax(-1).topk(5)
                assert row[4] == pytest.approx(p.tolist(), rel=0.01, abs=1e-6)
                assert page.data["names"][row[0]] == tokenizer.decode(ids[t]).replace(" ", "␣")
                assert page.data["names"][row[3][0]] == tokenizer.decode(likeliest[0]).replace(
                    " ", "␣")
                level = sum(row[1] >= least for least in em_inf.LEVELS)
                assert page.marks[2 * i + k][t][1] == f"e{level}"


def test_proposition_1_happens_on_the_page(page):
    """EM-INF may change the order behind the likeliest token, and never the likeliest itself."""
    sharpened = [row for rows in page.data["rows"][1::2] for row in rows if len(row) > 5]
    assert sharpened and all(row[5] < row[1] for row in sharpened)
    assert all(row[3][0] == row[6][0] for row in sharpened)
    moved = [row for row in sharpened if row[3] != row[6]]
    assert moved and page.tags.count("a") == len(moved)


def test_changed_tokens_are_marked_by_more_than_colour(page):
    assert {tag for tag, _ in page.marks[0]} == {"span"}
    first, second = page.tokens[:2]
    changed = [text for text, (tag, _) in zip(second, page.marks[1]) if tag == "ins"]
    assert (changed != []) == (first != second)


def test_the_legend_is_that_of_the_levels():
    """LEVELS of em_inf.py could change without the words in look.html."""
    template = (ROOT / "course/look.html").read_text(encoding="utf-8")
    said = re.findall(r'class="e\d">(?:under|from) ([\d.]+)<', template)
    assert [float(number) for number in said] == [em_inf.LEVELS[0], *em_inf.LEVELS]


def test_code_newlines_and_bytes_in_a_response_are_shown_and_do_nothing(
    tmp_path, monkeypatch, tiny
):
    """A response's own <script> could run, and a token of half a character could vanish."""
    monkeypatch.setattr(look, "generate", say(tiny[1], NASTY))
    page = make(tmp_path / "page.html", "--prompt", NASTY)
    shown = "".join(page.tokens[0])
    for part in '<script>alert("a")</script>↵\n', "  □ż□ó", "& □□□🐢", "⟨U+0000⟩", "${0}</p>":
        assert part in shown
    assert page.tags.count("script") == 1
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<script") == 1 and "<<" not in text and '"<' not in text
    assert text.count("&lt;</") == 6  # of the response's three, in two columns
    assert "�" not in "".join(page.data["names"])


def test_eight_responses_of_500_tokens_are_under_1_mb(tmp_path, monkeypatch, tiny):
    ids = torch.arange(500).remainder(279).tolist()
    monkeypatch.setattr(look, "generate", say(tiny[1], ids, spread=1.0))
    page = make(tmp_path / "page.html", "--limit", 4)
    assert [len(tokens) for tokens in page.tokens] == [500] * 8
    assert all(len(row) == 8 for row in page.data["rows"][1])  # the worst case: all sharpened
    assert (tmp_path / "page.html").stat().st_size < 1e6


def test_nothing_is_loaded_from_elsewhere(page, tmp_path):
    text = (ROOT / "course/look.html").read_text(encoding="utf-8")
    assert "default-src 'unsafe-inline'" in text and "//" not in re.sub(r" // .*", "", text)
    assert not {"link", "img", "iframe", "object"} & set(page.tags)


@pytest.fixture
def run(tmp_path):
    """A run's folder, whose checkpoint is the base model."""
    folder = tmp_path / "run"
    shutil.copytree(TINY_BASE, folder / "checkpoint")
    (folder / "checkpoint/state.pt").touch()
    config = {"script": "em_rl.py", "model": TINY_BASE, "val": em_inf.TINY["data"]}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"step": 0, "val_greedy": 0.5}, {"step": 1, "entropy": 0.3, "length": 9}]
    write_rows(folder / "metrics.csv", [*rows, {"step": 2, "entropy": 0.1, "length": 12}])
    return folder


def test_a_run_has_its_curves_and_base_and_trained_side_by_side(run, tmp_path):
    """A step that did not measure something could break a curve."""
    page = make(tmp_path / "page.html", "--run", run, "--limit", 1)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Nats: 0.3 to 0.1 in 2 steps" in text and "Accuracy: 0.5 to 0.5 in 0 steps" in text
    assert re.findall("<h3>(.*?)</h3>", text) == [
        "tiny/base", "run/checkpoint", "tiny/base with EM-INF"]
    assert page.tokens[0] == page.tokens[1]  # the same weights, problem and seed
    assert page.tags.count("polyline") == 3


@pytest.mark.parametrize("flags, said", [
    ("--model nowhere", "nowhere"),
    ("--run nowhere", "nowhere/config.json"),
    ("--data nowhere.jsonl", "nowhere.jsonl"),
    ("--model a --run b", "not allowed with"),
    ("--limit 0", "--limit"),
])
def test_bad_input_is_one_line(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        look.main(["--max-new-tokens", "2", *flags.split()])
    line = str(error.value)
    if error.value.code == 2:  # argparse prints it
        line = capsys.readouterr().err.strip().split("\n")[-1]
    assert said in line and "\n" not in line


def test_a_page_is_replaced_and_no_other_file(tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text('{"prompt": "1+1"}')
    with pytest.raises(SystemExit, match="mine.jsonl is there already"):
        make(mine, "--prompt", "1+1")
    assert mine.read_text() == '{"prompt": "1+1"}'
    for _ in range(2):
        make(tmp_path / "page.html", "--prompt", "1+1", "--max-new-tokens", 2)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_in_a_browser_the_keys_move_and_the_panel_tells(tmp_path, monkeypatch, tiny):
    """The script could fail on a token, where no test of the HTML would see it."""
    monkeypatch.setattr(look, "generate", say(tiny[1], NASTY))
    path = tmp_path / "page.html"
    page = make(path, "--prompt", NASTY)
    right = 'new KeyboardEvent("keydown", { key: "ArrowRight" })'
    steps = f"""<script>
    for (const token of document.querySelectorAll("main .tokens > *")) token.focus()
    const last = document.querySelectorAll("main .tokens")[1]
    last.firstChild.focus()
    last.firstChild.dispatchEvent({right})
    document.activeElement.dispatchEvent({right})</script></body>"""
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", steps), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    flags += "--enable-logging=stderr --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path}/profile", path.as_uri()]
    told = subprocess.run(command, capture_output=True, timeout=300)
    dom, log = told.stdout.decode(), told.stderr.decode(errors="replace")
    assert not re.search("Uncaught|Refused to|SyntaxError", log)
    row = page.data["rows"][1][2]
    panel = html.unescape(dom[dom.index('<section id="panel"') : dom.index("</section>")])
    assert f"Token 3, “{page.data['names'][row[0]]}”: entropy {row[1]:.3f} nats" in panel
    assert "The five likeliest\n1  " in panel and "After EM-INF" in panel
    assert dom.count('tabindex="0"') == 3  # one of each response, and the panel


def terminal(monkeypatch, capsys, tty, **environment):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    em_inf.main(["--prompt", "Mod 10, left to right: 8-7*6+2", "--device", "cpu"])
    return capsys.readouterr().out


def test_a_terminal_shows_the_same_answer_on_grounds_of_its_entropy(monkeypatch, capsys):
    """Colours could change what is said, get into a file, or ignore NO_COLOR."""
    plain = terminal(monkeypatch, capsys, tty=False)
    assert "\x1b" not in plain and "\\boxed" in plain
    assert terminal(monkeypatch, capsys, tty=True, NO_COLOR="1") == plain
    assert terminal(monkeypatch, capsys, tty=True, TERM="dumb") == plain
    legend, _, coloured = terminal(monkeypatch, capsys, tty=True).partition("\n")
    assert "2.0" in legend and "\x1b[48;5;111;30m" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain
