"""
An evaluation as a list of jobs in a fixed order. Several processes can share them, and what a kill
has interrupted goes on with those that are not done.
"""
import itertools
import json
import os
from pathlib import Path

from engine.files import lines_of, make_folder, read_config, replace_file
from engine.inputs import digest_of, digest_of_model, refuse_changes
from tasks.errors import UserError
from tasks.steps import pieces


def jobs_of(problems, args):
    """{data: problems} -> jobs: dicts of some problems of one data set, a decoder and a seed. A
    job's samples have `places` among all of that data set, decoder and seed, and are written at
    once."""
    jobs = []
    for data, decoder, seed in itertools.product(problems, args.decode, range(1, args.seeds + 1)):
        greedy = decoder == "greedy"
        if seed > 1 and greedy:
            continue  # greedy decoding does not depend on the seed
        n, end = 1 if greedy else args.n, 0
        for some in pieces(problems[data], max(1, args.rollout_batch // n)):
            places = range(end, end + len(some) * n)
            job = dict(data=data, decoder=decoder, seed=seed, n=n, problems=some, places=places)
            jobs.append(job)
            end = places.stop
    return jobs


def jobs_left(jobs, folder, first, parts):
    """The numbers of those jobs of a part that lack a sample: every parts-th, from the first on."""
    done = {(sample["job"], sample["place"]) for sample in lines_of(folder)}  # of every part
    left = []
    for number in range(first, len(jobs), parts):
        if not all((number, place) in done for place in jobs[number]["places"]):
            left.append(number)
    return left


def folder_in_use(args):
    """The folder of an evaluation that goes on, perhaps one that another part has begun."""
    if args.shard and args.out and os.path.exists(Path(args.out, "config.json")):
        return args.out
    return args.resume


def open_folder(args, problems, script, not_saved):
    """The folder of the evaluation, made with its config.json unless it exists already. UserError
    where it began with other settings, another model or other problems, or where it is in use."""
    settings = {"script": script}
    settings |= {key: value for key, value in vars(args).items() if key not in not_saved}
    settings["inputs"] = {data: digest_of(some) for data, some in problems.items()}
    settings["inputs"][args.model] = digest_of_model(args.model)
    begun = folder_in_use(args)  # asked again, since another part may have begun meanwhile
    if begun:
        refuse_changes(begun, read_config(begun, script), settings)
        return Path(begun)
    if args.out and os.path.exists(Path(args.out, "config.json")):
        raise UserError(f"{args.out} is in use: --resume {args.out}, or another --out")
    folder = make_folder(args.out, "runs/eval")
    replace_file(folder / "config.json", json.dumps(settings, indent=1) + "\n")
    return folder
