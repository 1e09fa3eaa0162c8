"""
Show where a model is unsure: a page with its responses, in which the background colour of each
token shows the entropy. The page is one HTML file and loads no other.

    python course/look.py                            # the tiny model, without and with EM-INF
    python course/look.py --optimizer sgd --lr 20    # Proposition 1: follow the links to tokens
    python course/look.py --run runs/NAME            # before and after a run, under its curves
    python course/look.py --model A --model B --prompt "What is 7 * 8?" --out page.html
"""
import argparse
import html
import json
import string
import sys
from bisect import bisect
from difflib import SequenceMatcher
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from em_inf import LEVELS, TINY, EMInf
from engine.arguments import Help, path_name, plain_text, positive, positive_int, whole_number
from engine.check import check_model
from engine.files import checkpoint_of, read_config, refuse_to_replace, replace_file
from engine.load import load_model, set_up
from engine.run import command, read_rows
from engine.sampler import generate
from entropy import output_head, score_all, token_entropy
from tasks.problems import load_problems
from tasks.prompts import encode_problem, stop_ids


def visible(text):
    """The text with a mark at each newline, and with a number for each invisible character."""
    shown = [c if c.isprintable() or c == "\n" else f"⟨U+{ord(c):04X}⟩" for c in text]
    return "".join(shown).replace("\n", "↵\n")


def place_of(id, tokenizer, names):
    """Where the name of a token stands in `names` ({name: place}). A new name is added."""
    text = tokenizer.decode([id])
    if "\ufffd" in text:  # a part of a character: the tokenizer has a name for it
        text = tokenizer.convert_ids_to_tokens(id)
    name = visible(text).strip("\n").replace(" ", "␣")
    return names.setdefault(name, len(names))


def likeliest(logits, tokenizer, names):
    """The five likeliest tokens of logits (1, V), the likeliest first: [names, probabilities]."""
    p, ids = logits[0].softmax(-1).topk(min(5, logits.shape[-1]))
    places = [place_of(id, tokenizer, names) for id in ids.tolist()]
    return [places, [float(f"{share:.3g}") for share in p.tolist()]]


def sample(model, tokenizer, sharpen, problem, names, args):
    """Sample a response: its token ids, and for each a row [name, entropy, log-prob, five
    likeliest, probabilities]. Where EM-INF sharpened the distribution, the new [entropy, five
    likeliest, probabilities] follow. Nats, at T = 1; a name is its place in `names`."""
    rows = []

    def record(logits):  # (1, V), right before a token is drawn
        sharper = sharpen(logits)
        row = likeliest(logits, tokenizer, names)
        if not torch.equal(sharper, logits):
            row.append(round(token_entropy(sharper).item(), 4))
            row += likeliest(sharper, tokenizer, names)
        rows.append(row)
        return sharper

    prompt, stop = encode_problem(tokenizer, problem), stop_ids(model, tokenizer)
    length = args.max_new_tokens
    check_model(model, [prompt], length)
    head = output_head(model, prompt)
    torch.manual_seed(args.seed)  # for one response at a time: all columns draw the same numbers
    rollout = generate(model, [prompt], stop, length, args.temperature, sharpen=record)
    ids = rollout.responses[0]
    scores = score_all(model, head, [prompt], [ids])
    entropies, logprobs = scores.entropy[0].tolist(), scores.logprobs[0].tolist()
    for row, id, entropy, logprob in zip(rows, ids, entropies, logprobs):
        row[:0] = [place_of(id, tokenizer, names), round(entropy, 4), round(logprob, 4)]
    return ids, rows


def token_spans(ids, rows, tokenizer, first_names, number):
    """The HTML of the tokens of response `number`. Those that a diff from the names of the first
    column shows as new are marked."""
    names, changed = [row[0] for row in rows], set()
    diff = SequenceMatcher(None, first_names, names, autojunk=False)
    for kind, _, _, start, end in diff.get_opcodes():
        if kind != "equal":
            changed.update(range(start, end))
    spans = before = ""
    for i, row in enumerate(rows):
        text = tokenizer.decode(ids[: i + 1]).rstrip("\ufffd")  # only whole characters
        shown = html.escape(visible(text[len(before) :]) or "□")
        tag = "ins" if i in changed else "span"
        level = bisect(LEVELS, row[1])
        spans += f'<{tag} class="e{level}" id="{number}.{i}">{shown}</{tag}>'
        before = text
    return spans


def summary(rows, number):
    """The line above response `number`, with links to where EM-INF changed the order."""
    mean = sum(row[1] for row in rows) / len(rows)
    text = f"{len(rows)} tokens, {mean:.3f} nats a token"
    sharpened = [i for i, row in enumerate(rows) if len(row) > 5]
    if not sharpened:
        return text
    kept, links = 0, []
    for i in sharpened:
        before, after = rows[i][3], rows[i][6]
        kept += before[0] == after[0]
        if before != after:
            links.append(f'<a href="#{number}.{i}">token {i + 1}</a>')
        mean += (rows[i][5] - rows[i][1]) / len(rows)
    return (f"{text}, {mean:.3f} after EM-INF. It sharpened {len(sharpened)}: the likeliest stayed "
            f"the likeliest in {kept}, the order of the five changed in "
            f"{', '.join(links) or 'none'}")


def article(path, model, tokenizer, sharpen, problem, data, args):
    """The HTML of one response to a problem. Its rows are added to `data`."""
    number = len(data["rows"])
    ids, rows = sample(model, tokenizer, sharpen, problem, data["names"], args)
    data["rows"].append(rows)
    first_names = problem.setdefault("first column", [row[0] for row in rows])
    spans = token_spans(ids, rows, tokenizer, first_names, number)
    title = html.escape("/".join(Path(path).parts[-2:]))
    return (f'<article><h3>{title}</h3><p>{summary(rows, number)}</p><p class="tokens" '
            f'role="group" aria-label="Tokens">{spans}</p></article>\n')


def curve(title, points):
    """The HTML of a curve through (x, y) points, none of them negative; "" without points."""
    if not points:
        return ""
    first, (end, last) = points[0][1], points[-1]
    top = max(y for _, y in points)
    line = " ".join(f"{x},{-y}" for x, y in points)
    return (f'<figure><figcaption>{title}: {first:.3g} to {last:.3g} in {end} steps</figcaption>'
            f'<svg viewBox="0 {-top} {end} {top}" role="none" preserveAspectRatio="none">'
            f'<polyline points="{line}"/></svg></figure>\n')


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    either = parser.add_mutually_exclusive_group().add_argument
    either("--model", type=path_name, action="append", help="folder or Hub id, once or more")
    either("--run", type=path_name, help="a run's folder: its base model and checkpoint")
    add("--data", help="problems: JSONL file or name; else the run's, or tiny/test.jsonl")
    add("--prompt", type=plain_text, help="ask this instead")
    add("--limit", type=positive_int, default=3, help="only the first LIMIT problems")
    add("--seed", type=whole_number, default=1, help="of the sampling")
    add("--max-new-tokens", type=positive_int, default=64, help="longest response, tokens")
    add("--temperature", type=positive, default=1.0, help="of the sampling, after EM-INF")
    add("--optimizer", choices=["adam", "sgd"], default="adam", help="of EM-INF's descent")
    add("--lr", type=positive, default=0.1, help="of EM-INF's descent")
    add("--out", type=Path, default=Path("runs/look.html"), help="the page")
    args = parser.parse_args(argv)
    template = Path(__file__).resolve().with_name("look.html").read_text(encoding="utf-8")
    refuse_to_replace(args.out, template[:99])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    models, source = args.model or [TINY["model"]], args.data or TINY["data"]
    curves = responses = ""
    if args.run:
        config = read_config(args.run)
        models = [config["model"], checkpoint_of(args.run)]
        source = args.data or config["val"]
        metrics = read_rows(Path(args.run, "metrics.csv"))
        for title, key in ("Nats", "entropy"), ("Accuracy", "val_greedy"), ("Tokens", "length"):
            curves += curve(title, [(row["step"], row[key]) for row in metrics if key in row])
    problems = [{"prompt": args.prompt}] if args.prompt else load_problems(source)

    columns = []  # title, model, tokenizer, and what happens to logits before a token is drawn
    for path in models:
        columns.append((path, *load_model(str(path), *set_up()), torch.clone))
    em_inf = EMInf(lr=args.lr, optimizer=args.optimizer)
    columns.append((f"{models[0]} with EM-INF", *columns[0][1:3], em_inf.sharpen))
    data = {"names": {}, "rows": []}
    for problem in problems[: args.limit]:
        responses += f'<h2>{html.escape(visible(problem["prompt"]))}</h2><div class="columns">\n'
        for column in columns:
            responses += article(*column, problem=problem, data=data, args=args)
        responses += "</div>\n"

    data["names"] = list(data["names"])
    about = f"Temperature {args.temperature:g}; EM-INF by {args.optimizer}, lr {args.lr:g}."
    data = json.dumps(data).replace("<", "\\u003c")  # no tag may begin in it
    fields = dict(about=about, curves=curves, responses=responses, data=data)
    page = string.Template(template).substitute(fields)
    replace_file(args.out, page)
    print(f"{args.out}: {args.out.stat().st_size / 1000:,.0f} kB; open it in a browser")


if __name__ == "__main__":
    main()
