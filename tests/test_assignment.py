"""course/assignment/: a right solution gets all points, and each usual mistake the words for it."""
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import em_rl
from engine.load import load_model
from engine.sampler import generate
from entropy import output_head, score
from tasks.problems import load_problems
from tasks.prompts import encode_problem, stop_ids
from tests.models import FEW, ROOT, TINY_BASE

sys.path.insert(0, str(ROOT / "course/assignment"))
import grade
import training

SOLUTION = '''
import torch


def token_entropy(logits):
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def token_logprobs(logits, ids):
    logprobs = logits[:, :-1].log_softmax(-1)
    return logprobs.gather(-1, ids[:, 1:, None])[..., 0]


def response_mask(ids, stop):
    ends = torch.isin(ids, torch.tensor(stop)).long()
    return ends.cumsum(1) - ends == 0


def token_reward(entropy, mask):
    return (-entropy.detach() * mask).sum(1) / mask.sum(1)


def sequence_reward(logprobs, mask):
    return (logprobs.detach() * mask).sum(1) / mask.sum(1)


def rloo_advantage(rewards):
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def policy_objective(logprobs, advantages, mask, num_tokens):
    return (advantages[:, None] * logprobs * mask).sum() / num_tokens


def em_ft_objective(entropy, mask, num_tokens):
    return -(entropy * mask).sum() / num_tokens


def em_inf_step(logits, m, v, step, lr=0.1, delta=0.3):
    logits = logits.detach()
    z = logits.clone().requires_grad_()
    entropy = token_entropy(z)
    (g,) = torch.autograd.grad(entropy.sum(), z)
    m = 0.9 * m + 0.1 * g
    v = 0.999 * v + 0.001 * g**2
    move = lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return torch.where(entropy[:, None] < delta, logits, logits - move), m, v
'''

# function, a part of it and what stands there instead, words of the message
MISTAKES = {
    "eps": (
        "token_entropy",
        "return -(logprobs.exp() * logprobs).sum(-1)",
        "return -(logprobs.exp() * (logprobs.exp() + 1e-12).log()).sum(-1)",
        "eps inside the logarithm",
    ),
    "bits": (
        "token_entropy",
        "return -(logprobs.exp() * logprobs).sum(-1)",
        "return torch.distributions.Categorical(logits=logits).entropy() / torch.tensor(2.0).log()",
        "in bits",
    ),
    "off by one": (
        "token_logprobs",
        "logits[:, :-1].log_softmax(-1)",
        "logits[:, 1:].log_softmax(-1)",
        "Off by one",
    ),
    "the end forgotten": (
        "response_mask", "ends.cumsum(1) - ends == 0", "ends.cumsum(1) == 0", "end is forgotten"
    ),
    "pad counted": (
        "response_mask", "ends.cumsum(1) - ends == 0", "ends.cumsum(1) <= 1", "Padding is counted"
    ),
    "sum for mean": ("token_reward", " / mask.sum(1)", "", "the sum over the tokens"),
    "a gradient through the reward": ("token_reward", ".detach()", "", "a gradient flows"),
    "no baseline": ("rloo_advantage", "rewards - others", "rewards", "no baseline"),
    "the own reward in the baseline": (
        "rloo_advantage",
        "rewards - others",
        "rewards - rewards.mean(1, keepdim=True)",
        "own reward",
    ),
    "a mean of means": ("policy_objective", "/ num_tokens", "/ mask.sum()", "mean of means"),
    "the sign": ("policy_objective", "return (adv", "return -(adv", "sign is wrong"),
    "Adam's sign": ("em_inf_step", "logits - move", "logits + move", "Uphill"),
    # and some that are not among the twelve
    "log of p": (
        "token_entropy", "logits.log_softmax(-1)", "logits.softmax(-1).log()", "nan for logits"
    ),
    "clamp": (
        "token_entropy",
        "logits.log_softmax(-1)",
        "logits.softmax(-1).clamp(min=1e-6).log()",
        "should be",
    ),
    "no shift": ("token_logprobs", "[:, :-1].log_softmax(-1)", ".log_softmax(-1)[:, 1:]", "Off by"),
    "one stop id": ("response_mask", "tensor(stop)", "tensor(stop[0])", "with stop ids 7 and 9"),
    "pad in the reward": ("token_reward", " * mask).sum(1) / mask.sum(1)", ").mean(1)", "Padding"),
    "sum of log-probs": ("sequence_reward", " / mask.sum(1)", "", "the sum over the tokens"),
    "a mean of responses": (
        "policy_objective",
        "(advantages[:, None] * logprobs * mask).sum() / num_tokens",
        "(advantages * (logprobs * mask).sum(1) / mask.sum(1)).mean()",
        "mean of means",
    ),
    "detached": ("em_ft_objective", "(entropy *", "(entropy.detach() *", "no gradient flows"),
    "EM-FT's sign": ("em_ft_objective", "-(entropy", "(entropy", "sign is wrong"),
    "delta": ("em_inf_step", "< delta", "< 0", "under delta has moved"),
    "no bias correction": ("em_inf_step", "m / (1 - 0.9**step)", "m", "bias is not corrected"),
    "a gradient in EM-INF": ("em_inf_step", "logits = logits.detach()", "", "a gradient flows"),
    "in place": ("em_inf_step", "m = 0.9 * m + 0.1 * g", "m.mul_(0.9).add_(0.1 * g)", "in place"),
    "float32": ("token_reward", "(-entropy.", "(-entropy.float().", "keep their dtype"),
    "nothing returned": ("rloo_advantage", "return rewards - others", "pass", "NoneType"),
    "a shape": ("rloo_advantage", "rewards - others", "(rewards - others).flatten()", "shape is"),
}


def graded(tmp_path, name, source):
    """What grade.py says of one function of a file."""
    file = tmp_path / "solution.py"
    file.write_text(source, encoding="utf-8")
    return grade.verdict(name, SimpleNamespace(file=str(file)))


@pytest.mark.parametrize("name", grade.FUNCTIONS)
def test_a_right_solution_gets_the_points(name, tmp_path):
    assert graded(tmp_path, name, SOLUTION) == ""


@pytest.mark.parametrize("name, old, new, words", MISTAKES.values(), ids=MISTAKES)
def test_a_usual_mistake_fails_its_function_with_words_for_it(name, old, new, words, tmp_path):
    before, start, rest = SOLUTION.partition(f"def {name}(")
    body, end, after = rest.partition("\n\n\n")
    assert body.count(old) == 1
    source = before + start + body.replace(old, new) + end + after
    assert words in graded(tmp_path, name, source)


def test_the_hand_out_lists_the_functions_that_are_graded():
    page = (ROOT / "course/assignment/README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \d \| `(\w+)` \|", page, re.M) == grade.FUNCTIONS
    assert f"with {len(MISTAKES)} mistakes" in page


def test_training_follows_the_gradient_of_em_rl():
    """Guards against a loop that trains by something else than em_rl.py with these functions."""
    model, tokenizer = load_model(TINY_BASE, "cpu")
    weights, stop = list(model.parameters()), stop_ids(model, tokenizer)
    prompts = [encode_problem(tokenizer, problem) for problem in load_problems(FEW)[:30]]
    torch.manual_seed(0)
    rollout = generate(model, prompts, stop, max_new_tokens=40, N=training.N)
    prompts = [prompt for prompt in prompts for _ in range(training.N)]
    assert len({len(ids) for ids in rollout.responses}) > 5 and len({len(p) for p in prompts}) > 2

    solution = {}
    exec(SOLUTION, solution)
    objective = training.objective_of(
        SimpleNamespace(**solution), model, prompts, rollout.responses, stop
    )
    got = torch.autograd.grad(objective, weights)

    new = score(model, output_head(model, prompts[0]), prompts, rollout.responses)
    rewards = em_rl.token(rollout).view(-1, training.N)
    advantages = em_rl.advantage("rloo", rewards).view(-1, 1)
    args = SimpleNamespace(clip=0.2, entropy_coef=0.0, beta=0.0)
    objective = em_rl.policy_objective(new, rollout.logprobs, None, advantages, args)
    want = torch.autograd.grad((objective * new.mask).sum() / new.mask.sum(), weights)
    for mine, ours in zip(got, want):
        assert_close(mine, ours, rtol=1e-3, atol=1e-3 * ours.abs().max().item())


def test_training_is_judged_by_the_accuracy_that_it_gains(tmp_path, monkeypatch, capsys):
    file = tmp_path / "solution.py"
    file.write_text(SOLUTION, encoding="utf-8")
    args = SimpleNamespace(file=str(file), steps=1, problems=8)
    assert "20% are asked" in grade.verdict("training", args)
    assert "step  1 | greedy accuracy" in capsys.readouterr().out
    monkeypatch.setattr(training, "train", lambda student, steps, problems: 0.31)
    assert grade.verdict("training", args) == ""


def test_training_that_has_no_points_is_not_graded(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(grade.POINTS, "training")
    monkeypatch.setattr(grade, "grade", lambda names, _: dict.fromkeys(names, ""))
    (tmp_path / "right.py").write_text("")
    assert grade.main([str(tmp_path / "right.py")]) == 0
    assert capsys.readouterr().out.startswith("18 of 18 points, 9 of 9 functions")


@pytest.mark.beside(command=lambda _: [ROOT / "course/assignment/grade.py"])
def test_the_file_to_be_filled_has_no_points_and_is_not_trained_with(done):
    assert done.returncode == 1 and not done.stderr
    assert "0 of 20 points, 0 of 9 functions" in done.stdout
    assert done.stdout.count("is not written yet") == 9 and "step" not in done.stdout[-150:]
    assert "step 0" not in done.stdout and "It has to wait for token_entropy" in done.stdout


def test_a_function_that_hangs_or_ends_the_process_loses_its_own_points_only(tmp_path, capsys):
    source = SOLUTION
    for old, new in {
        "return logprobs.gather": "while True: pass",
        "ends = ": "import os; os._exit(0)",
        "return (-entropy": "raise SystemExit('bye')",
        "return (logprobs.detach()": "return missing",
        "return -(entropy *": "return None",
    }.items():
        source = source.replace(f"    {old}", f"    {new}\n    {old}")
    file = tmp_path / "hostile.py"
    file.write_text(source.replace("def em_inf_step", "def another"), encoding="utf-8")
    assert grade.main([str(file), "--seconds", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "token_entropy     2 of 2"
    assert lines[-1] == "7 of 20 points, 3 of 9 functions"
    text = "\n".join(lines)
    assert "There is no em_inf_step" in text and "NoneType" in text
    assert text.count("No result in 2 seconds") == text.count("As above.") == 1
    assert "SystemExit: bye" in text
    assert "return missing" in text and "NameError: name 'missing'" in text
    assert f'File "{file}", line 2' in " ".join(text.split())  # a long path ends its line
    assert "grade.py" not in text


def test_a_file_that_can_t_be_loaded_is_named_with_its_line(tmp_path, capsys):
    file = tmp_path / "typo.py"
    file.write_text(SOLUTION.replace("def token_reward(entropy, mask):", "def token_reward("))
    assert grade.main([str(file)]) == 1
    text = capsys.readouterr().out
    assert text.count("typo.py") == text.count("SyntaxError") == 1 and "0 of 20 points" in text
    assert text.count("As above.") == 8
    with pytest.raises(SystemExit, match="2"):
        grade.main([str(tmp_path / "absent.py")])
    assert "absent.py: there is no such file" in capsys.readouterr().err
