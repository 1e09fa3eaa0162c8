"""
How a problem is put to a model, as token ids, and a response taken from it, as text: in its
chat template where it has one.
"""
import ast
import re

from tasks.answers import OPENING
from tasks.errors import UserError, one_line

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # the paper's
CODE = "Please reason step by step, and put your final program into one ```python block."
REFINE = "Check this answer step by step, and give a corrected and complete one in the same form."
PYTHON = {"true": "True", "false": "False", "null": "None", "none": "None"}
SET = "{# set by --template #}"  # what stands before it in a chat template are our settings


def encode_prompt(tokenizer, prompt, earlier=None, system=SYSTEM):
    """Token ids of a prompt, in the chat template where the tokenizer has one.

    Without a template it is the plain text and a line break. `earlier` is a response to be
    refined: its turn and a request follow, or in plain text it and the prompt again.
    """
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        if earlier is not None:
            turns.append({"role": "assistant", "content": earlier})
            turns.append({"role": "user", "content": REFINE})
        text = render(tokenizer, turns, system, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote them
    again = "" if earlier is None else f"{earlier}\n\n{prompt}\n"
    ids = tokenizer(f"{prompt}\n{again}")["input_ids"]
    while ids and ids[-1] in tokenizer.all_special_ids:  # some tokenizers end each text with eos
        ids.pop()
    return ids


def encode_problem(tokenizer, problem, earlier=None):
    """`encode_prompt` with the system prompt that fits: another one where there are tests."""
    system = CODE if "tests" in problem else SYSTEM
    return encode_prompt(tokenizer, problem["prompt"], earlier, system)


def render(tokenizer, turns, system=SYSTEM, **options):
    """The text of some turns in the chat template.

    The system prompt has a turn of its own. Some templates refuse that, each in its own words,
    and others leave it out, so there it goes into the first user's turn. Raises UserError where
    that fails too, or the text does not have the prompt.
    """
    prompt = turns[0]["content"]
    in_one_turn = {"role": "user", "content": f"{system}\n\n{prompt}"}
    for first in [{"role": "system", "content": system}, turns[0]], [in_one_turn]:
        cause = None
        try:
            text = tokenizer.apply_chat_template(first + turns[1:], tokenize=False, **options)
        except Exception as error:  # a template is a program, and can raise anything
            cause = error
        else:
            if system in text and prompt.strip() in text:
                return text
    reason = "it leaves the prompt out" if cause is None else f"{type(cause).__name__}: {cause}"
    raise UserError(
        f"{tokenizer.name_or_path}: its chat template can't be used ({one_line(reason)}); mend it "
        "in the folder, or remove it: then prompts are plain text"
    ) from cause


def set_template(tokenizer, settings):
    """Give the chat template settings, such as "enable_thinking=false".

    They are written into the template itself, so that a checkpoint's folder keeps them. Raises
    UserError for one that the template does not ask for.
    """
    if not settings:
        return
    template = tokenizer.get_chat_template() if tokenizer.chat_template else ""
    before, _, own = template.rpartition(SET)
    for setting in settings:
        key, _, value = setting.partition("=")
        if not re.search(rf"\b{key}\b", own):
            asked = sorted(set(re.findall(r"(?<![\w.])(\w+) is (?:not )?defined", own)))
            raise UserError(f"--template {setting}: the chat template of {tokenizer.name_or_path} "
                            f"asks for no such setting, but for {', '.join(asked) or 'none'}")
        value = PYTHON.get(value.lower(), value)
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a word, as in reasoning_effort=high
            pass
        line = f"{{% set {key} = {value!r} %}}"
        before = before.replace(line, "") + line
    tokenizer.chat_template = before + SET + own


def stop_ids(model, tokenizer):
    """Ids of the tokens that end a response: the chat template's, the tokenizer's and the
    checkpoint's, in that order. The first is what a written response should end with.

    Raises UserError for a checkpoint's that is no number.
    """
    ids = model.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id] + (ids if isinstance(ids, list) else [ids])
    if tokenizer.chat_template:  # a turn need not end with <|endoftext|>
        ids = [end_of_turn(tokenizer)] + ids
    for i in ids:
        if not isinstance(i, int | None):
            raise UserError(f"model {model.name_or_path}: eos_token_id {i!r} in its "
                            "generation_config.json is not a token's number")
    return [i for i in dict.fromkeys(ids) if i is not None]


def end_of_turn(tokenizer):
    """Id of the token that the chat template writes behind a response. None where there is none,
    or only text."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "#!#"}]
    try:
        _, found, after = render(tokenizer, turns).rpartition("#!#")
    except UserError:  # a template for prompts alone
        return None
    added = [*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()]
    for i in tokenizer(after, add_special_tokens=False)["input_ids"] if found else []:
        if tokenizer.decode([i]).strip():  # some write a line break before it
            return i if i in added else None
    return None


def response_texts(tokenizer, responses):
    """The texts of responses (token ids), without special tokens other than those that mark a
    thought.

    Where the chat template opens a thought at the end of the prompt, its mark stands in front,
    since a response that never closes the thought has no answer.
    """
    skipped = set(tokenizer.all_special_ids)
    skipped |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks = re.compile("thought|think|channel|message", re.IGNORECASE)
    skipped = {i for i in skipped if not marks.search(tokenizer.convert_ids_to_tokens(i))}
    opened = None
    if tokenizer.chat_template:
        prompt = render(tokenizer, [{"role": "user", "content": "?"}], add_generation_prompt=True)
        opened = re.search(rf"(?:{OPENING})\s*\Z", prompt)
    texts = []
    for ids in responses:
        text = tokenizer.decode([i for i in ids if i not in skipped])
        texts.append(opened[0] + text if opened else text)
    return texts
