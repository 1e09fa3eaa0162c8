"""
Problems that come "after" others, as the steps of SciCode's problems do.

A step is asked with the model's own programs of the steps before it, and graded behind them.
Each of n samples has programs of its own. Any other problem is a step that comes after none.
"""
import itertools

from tasks.answers import find_answer

PROGRAM = "[[program of {}]]"  # in a prompt: the model's own, of the problem with this id


def with_programs(problem, programs):
    """A step as a problem of its own. `programs`: {id of each step before: its program}.

    They stand in its prompt, where it says [[program of ID]], and behind its setup.
    """
    prompt = problem["prompt"]
    for name, program in programs.items():
        prompt = prompt.replace(PROGRAM.format(name), program)
    setup = "\n".join([problem.get("setup", ""), *programs.values()])
    return problem | {"prompt": prompt, "setup": setup, "after": []}


def ask_in_rounds(problems, n, ask):
    """Have n answers to each problem: -> samples, those of a problem side by side.

    `ask(problems, n)` gives the samples of problems without steps before them. It is called
    once for all that come after no other, once for all that come after these, and so on.
    """
    depth = {}
    for problem in problems:
        above = [depth[name] for name in problem.get("after", [])]
        depth[problem["id"]] = 1 + max(above, default=-1)
    samples, programs = {}, {}  # n samples by a problem's place, n programs by its id
    for level in range(1 + max(depth.values())):
        places = [i for i, problem in enumerate(problems) if depth[problem["id"]] == level]
        some = [problems[i] for i in places]
        if level == 0:
            answers = ask(some, n)
        else:  # the n samples of a step have n prompts
            asked = []
            for problem, k in itertools.product(some, range(n)):
                own = {name: programs[name][k] for name in problem["after"]}
                asked.append(with_programs(problem, own))
            answers = ask(asked, 1)
        for i, problem in enumerate(some):
            group = samples[places[i]] = answers[i * n : i * n + n]
            found = [find_answer(sample["response"], problem) or "" for sample in group]
            programs[problem["id"]] = found
    return list(itertools.chain.from_iterable(samples[i] for i in range(len(problems))))


def as_asked(problems, samples):
    """The problems of samples, each with the programs of its own sample of the steps before.

    Samples of one seed and one place among a problem's n belong together, whatever job they
    were in. They come in the order of their places.
    """
    first, programs, asked = {}, {}, []
    for problem, sample in zip(problems, samples):
        seed, place = sample["seed"], sample["place"]
        k = place - first.setdefault((seed, problem["id"]), place)
        programs[seed, k, problem["id"]] = find_answer(sample["response"], problem) or ""
        after = problem.get("after", [])
        own = {name: programs.get((seed, k, name), "") for name in after}
        asked.append(with_programs(problem, own) if after else problem)
    return asked


def pieces(problems, size):
    """Split problems into pieces of `size` problems and the steps that come after them: a step is
    in the same piece as the steps before it."""
    places = {problem["id"]: i for i, problem in enumerate(problems)}
    first, starts = len(problems), []  # first: of all that the problems from i on come after
    for i in reversed(range(len(problems))):
        first = min(first, i, *[places[name] for name in problems[i].get("after", [])])
        if first == i:
            starts.append(i)
    starts = starts[::-1][::size]
    return [problems[i:j] for i, j in zip(starts, [*starts[1:], None])]
