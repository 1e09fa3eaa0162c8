"""
How a problem is put to a model: as token ids, in its chat template where it has one.
"""
SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # the paper's
CODE = "Please reason step by step, and put your final program into one ```python block."
REFINE = "Check this answer step by step, and give a corrected and complete one in the same form."


def encode_prompt(tokenizer, prompt, earlier=None, system=SYSTEM):
    """Token ids of a prompt, in the chat template where the tokenizer has one.

    The system prompt goes into the user's turn where the template knows no system role.
    Without a template it is the plain text and a line break. `earlier` is a response to
    be refined: its turn and a request follow, or in plain text it and the prompt again.
    """
    if tokenizer.chat_template is None:
        again = "" if earlier is None else f"{earlier}\n\n{prompt}\n"
        return tokenizer(f"{prompt}\n{again}")["input_ids"]
    turns = [{"role": "user", "content": prompt}]
    if earlier is not None:
        turns.append({"role": "assistant", "content": earlier})
        turns.append({"role": "user", "content": REFINE})
    options = dict(tokenize=False, add_generation_prompt=True)
    try:
        with_system = [{"role": "system", "content": system}] + turns
        text = tokenizer.apply_chat_template(with_system, **options)
    except Exception as error:  # the template itself raises, through jinja2: Gemma's does
        if "system" not in str(error).lower():
            raise
        turns[0]["content"] = f"{system}\n\n{prompt}"
        text = tokenizer.apply_chat_template(turns, **options)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote them


def stop_ids(model, tokenizer):
    """Ids of the tokens that end a response: the chat template's, the tokenizer's and the
    checkpoint's, in that order. The first is what a written response should end with."""
    ids = model.generation_config.eos_token_id
    ids = [tokenizer.eos_token_id] + (ids if isinstance(ids, list) else [ids])
    if tokenizer.chat_template is not None:  # a turn need not end with <|endoftext|>
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "#!#"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        after = tokenizer(text.rpartition("#!#")[2], add_special_tokens=False)["input_ids"]
        ids = [i for i in after[:1] if i in tokenizer.all_special_ids] + ids
    return [i for i in dict.fromkeys(ids) if i is not None]


def encode_problem(tokenizer, problem, earlier=None):
    """`encode_prompt` with the system prompt that fits: another one where there are tests."""
    system = CODE if "tests" in problem else SYSTEM
    return encode_prompt(tokenizer, problem["prompt"], earlier, system)
