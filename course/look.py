"""
See where a model is unsure: a page on which every token of its responses stands on a ground
coloured by entropy. It is one HTML file, and loads nothing from elsewhere.

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
from engine.files import read_config, refuse_to_replace
from engine.load import load_model, set_up
from engine.run import checkpoint_of, command, read_rows
from engine.sampler import generate
from entropy import output_head, score_all, token_entropy
from tasks.errors import UserError
from tasks.problems import load_problems
from tasks.prompts import encode_problem, stop_ids


def visible(text):
    """Text with a mark at each newline, and a number for each character one cannot see."""
    shown = ""
    for char in text:
        shown += char if char.isprintable() or char == "\n" else f"⟨U+{ord(char):04X}⟩"
    return shown.replace("\n", "↵\n")


def column(path, model, tokenizer, sharpen, problem, data, args):
    """Sample one response, add its rows to `data`, and give its HTML. A row is a token's [name,
    entropy, log-prob, five likeliest, probabilities], and where EM-INF sharpened it [entropy, five
    likeliest, probabilities] after that; nats at T = 1. A name is its place in data["names"]."""
    rows, names, number, spans, before = [], data["names"], len(data["rows"]), "", ""

    def name(id):
        text = tokenizer.decode([id])
        if "\ufffd" in text:  # bytes of a character, which only the tokenizer can name
            text = tokenizer.convert_ids_to_tokens(id)
        return names.setdefault(visible(text).strip("\n").replace(" ", "␣"), len(names))

    def likeliest(logits):
        p, ids = logits[0].softmax(-1).topk(min(5, logits.shape[-1]))
        return [name(id) for id in ids.tolist()], [float(f"{x:.3g}") for x in p.tolist()]

    def record(logits):  # (1, V), right before a token is drawn
        sharper = sharpen(logits)
        rows.append([*likeliest(logits)])
        if not torch.equal(sharper, logits):
            rows[-1] += [round(token_entropy(sharper).item(), 4), *likeliest(sharper)]
        return sharper

    # sampled alone, so that a seed means the same random numbers in all columns
    prompt, stop = encode_problem(tokenizer, problem), stop_ids(model, tokenizer)
    check_model(model, [prompt], args.max_new_tokens)
    head, length = output_head(model, prompt), args.max_new_tokens
    torch.manual_seed(args.seed)
    rollout = generate(model, [prompt], stop, length, args.temperature, sharpen=record)
    (ids,) = rollout.responses
    entropy, logprobs, _ = score_all(model, head, [prompt], [ids])
    for row, id, h, logprob in zip(rows, ids, entropy[0].tolist(), logprobs[0].tolist()):
        row[:0] = [name(id), round(h, 4), round(logprob, 4)]

    new = [row[0] for row in rows]
    old = problem.setdefault("first column", new)
    for kind, _, _, start, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        for i in range(start, end):
            text = tokenizer.decode(ids[: i + 1]).rstrip("\ufffd")  # only whole characters
            shown = html.escape(visible(text[len(before) :]) or "□")
            tag, place = "span" if kind == "equal" else "ins", f"{number}.{i}"
            spans += f'<{tag} class="e{bisect(LEVELS, rows[i][1])}" id="{place}">{shown}</{tag}>'
            before = text
    mean = sum(row[1] for row in rows) / len(rows)
    facts = f"{len(rows)} tokens, {mean:.3f} nats a token"
    sharpened = [i for i, row in enumerate(rows) if len(row) > 5]
    if sharpened:
        kept = sum(rows[i][3][0] == rows[i][6][0] for i in sharpened)
        moved = [i for i in sharpened if rows[i][3] != rows[i][6]]
        links = [f'<a href="#{number}.{i}">token {i + 1}</a>' for i in moved]
        mean += sum(rows[i][5] - rows[i][1] for i in sharpened) / len(rows)
        facts += (f", {mean:.3f} after EM-INF. It sharpened {len(sharpened)}: the likeliest stayed "
                  f"so in {kept}, the order of the five changed in {', '.join(links) or 'none'}")
    data["rows"].append(rows)
    title = html.escape("/".join(Path(path).parts[-2:]))
    return (f'<article><h3>{title}</h3><p>{facts}</p><p class="tokens" role="group" '
            f'aria-label="Tokens">{spans}</p></article>\n')


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    either = parser.add_mutually_exclusive_group().add_argument
    either("--model", type=path_name, action="append", help="folder or Hub id; give two to "
           "compare them")
    either("--run", type=path_name, help="folder of a training run: its base model and its "
           "checkpoint")
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
    models, source = args.model or [TINY["model"]], args.data or TINY["data"]
    data, body, curves = {"names": {}, "rows": []}, "", ""
    template = Path(__file__).with_name("look.html").read_text(encoding="utf-8")
    refuse_to_replace(args.out, template[:99])
    try:
        if args.run:
            config, metrics = read_config(args.run), read_rows(Path(args.run, "metrics.csv"))
            models, source = [config["model"], checkpoint_of(args.run)], args.data or config["val"]
            for name, key in ("Nats", "entropy"), ("Accuracy", "val_greedy"), ("Tokens", "length"):
                points = [(row["step"], row[key]) for row in metrics if key in row]
                if not points:  # no held-out problems
                    continue
                (_, first), (end, last), top = points[0], points[-1], max(y for _, y in points)
                line = " ".join(f"{x},{-y}" for x, y in points)
                curves += (f'<figure><figcaption>{name}: {first:.3g} to {last:.3g} in {end} steps'
                           f'</figcaption><svg viewBox="0 {-top} {end} {top}" role="none" preserve'
                           f'AspectRatio="none"><polyline points="{line}"/></svg></figure>\n')
        asked = [{"prompt": args.prompt}] if args.prompt else load_problems(source)
        columns = [(path, *load_model(str(path), *set_up()), torch.clone) for path in models]
        em_inf = EMInf(lr=args.lr, optimizer=args.optimizer)
        columns.append((f"{models[0]} with EM-INF", *columns[0][1:3], em_inf.sharpen))
        for problem in asked[: args.limit]:
            body += f'<h2>{html.escape(visible(problem["prompt"]))}</h2><div class="columns">\n'
            for sampler in columns:
                body += column(*sampler, problem=problem, data=data, args=args)
            body += "</div>\n"
        about = f"Temperature {args.temperature:g}; EM-INF by {args.optimizer}, lr {args.lr:g}."
        data = json.dumps(data | {"names": list(data["names"])}).replace("<", "\\u003c")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(string.Template(template).substitute(
            about=about, curves=curves, responses=body, data=data), encoding="utf-8")
    except (OSError, UserError) as error:
        sys.exit(f"look.py: {error}")
    print(f"{args.out}: {args.out.stat().st_size / 1000:,.0f} kB; open it in a browser")


if __name__ == "__main__":
    main()
