r"""
Do two answers mean the same? 0.5 and \frac12 do; (1,2) and (2,1) don't.

    same_answer(r"\frac12", "0.5")             # True: the problem's answer, and the one in a box
    same_answer("(1,2)", r"x = 1,\; y = 2")    # True
    same_answer("5", r"5\text{ out of }10")    # False

An answer is taken apart: lists and tuples into items, equations into sides, quantities into value
and unit. What is left is an expression, or it can't be read: then it is compared as a text, never
by a part of it. Nothing here needs a clock, a signal or a process, so it is the same on Windows
and in threads.

Known errors: one unit is as good as another if only one side has any (5 is 5 cm and 5 m); "x+y=3"
says 3, since a box may repeat what was asked for; intervals and inequalities are not united.
"""
import functools
import re

from tasks.notation import normalise
from tasks.values import is_constant, proportional, same_expression

LONGEST = 1000  # characters of two answers: no benchmark has longer ones
LETTER = r"[({\s]*([A-J])[)}\s]*"  # B, (B) or {B}
CHOICE = LETTER + r"(?:[).:}](?!.*\([A-J]\))(.*\S.*))?"  # and perhaps more: B) 12

# --------------------------------------------------------------------------------- texts

OPENING = r"\\begin\{\w+\}|\\\{|[(\[{]"
CLOSING = r"\\end\{\w+\}|\\\}|[)\]}]"


def split(text, separator):
    """(parts, separators) of a text, split where a pattern matches outside of all brackets."""
    parts, found, depth, start = [], [], 0, 0
    for match in re.finditer(rf"({OPENING})|({CLOSING})|(?:{separator})", text):
        if match[1] or match[2]:
            depth += 1 if match[1] else -1
        elif depth == 0:
            parts.append(text[start : match.start()].strip())
            found.append(match[0])
            start = match.end()
    return [*parts, text[start:].strip()], found


def is_bracketed(text):
    """Does the bracket that a text begins with close at its end?"""
    depth = 0
    for match in re.finditer(rf"({OPENING})|{CLOSING}", text):
        depth += 1 if match[1] else -1
        if depth == 0:
            return match.end() == len(text) and text.startswith(("(", "[", "{", r"\{"))
    return False


def plain(text):
    r"""A text to be compared as it is: without \text, needless spaces and the case of words."""
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<!\w) +| +(?!\w)", "", text)
    text = re.sub(r"(\\[A-Za-z]+) +(?![A-Za-z])", r"\1", text)
    text = re.sub(r"\{(\w)\}", r"\1", text)
    return text.casefold() if re.search(r"(?<!\\)\b[^\W\d_]{2}", text) else text


def is_word(text):
    """Is it a word rather than a product of letters?"""
    return bool(re.fullmatch("[A-Za-z]{3,}", text) and re.search("[aeiou]", text))


# ----------------------------------------------------------------------------- quantities

SPELLINGS = """
m meter metre; g gram; s sec second; min minute; h hr hour; day; week; month; yr year; l L liter
litre; in inch inche; ft foot feet; yd yard; mi mile; lb pound; oz ounce; dollar; cent; N newton;
J joule; W watt; V volt; A amp ampere; K kelvin; Pa pascal; Hz hertz; C coulomb; F farad; T tesla;
Ω ohm; eV; cal calorie; mol mole; rad radian; B bel; atm; mph; kmh; ° degree deg; unit
"""  # of units; the first of each stands for all
UNITS = {}
for spellings in SPELLINGS.split(";"):
    UNITS.update(dict.fromkeys(spellings.split(), spellings.split()[0]))
PREFIXES = {
    "": "", "k": "k", "kilo": "k", "c": "c", "centi": "c", "m": "m", "milli": "m", "μ": "μ",
    "micro": "μ", "n": "n", "nano": "n", "M": "M", "mega": "M", "G": "G", "giga": "G", "d": "d",
}
SMALL_WORDS = {"square", "sq", "cubic", "cu", "per", "of", "the", "a", "old"}
QUALIFIERS = set(  # words that are no unit but change what an answer says
    "if when where for with except odd even prime not no is are out at least most more less than "
    "positive negative all any every".split()
)
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
BASE = r"[({]*([\dA-F]*\d[\dA-F]*)[)}]*\s*_\{?\(?(\w+)\)?\}?"  # 1010_2
NUMERIC = r"(?:[-+\d\s.,:/*^(){}!]|\\(?:frac|sqrt|pi|times|cdot)(?![A-Za-z]))+?"
BEGINS_UNIT = r"\\text|\\frac\{\s*(?:\\text|[A-Za-z])|\\mu|\\Omega|[^\W\d_]|[%°]"
QUANTITY = rf"({NUMERIC}|.+?(?=\\text))(\s*)((?:{BEGINS_UNIT}).*)"


def unit(word):
    """(name, is it a unit?): one name for all spellings of a unit, or of another thing."""
    if word in SMALL_WORDS:
        return word, True
    singular = word.lower().removesuffix("s")
    for name in word, word.lower(), singular:
        for prefix, short in PREFIXES.items():
            if name.startswith(prefix) and name.removeprefix(prefix) in UNITS:
                return short + UNITS[name.removeprefix(prefix)], True
    return singular, False


@functools.lru_cache(maxsize=10_000)
def quantity(text):
    r"""(value, words) of a quantity: "5" and {"cm"} of r"5\text{ cm}" and of "5 cm".

    Words without \text have to be units, or stand behind a space and look like English: 5x, 5 x
    and 5m have none. The base of a number is a word, too."""
    if match := re.fullmatch(BASE, text):
        base = str(NUMBERS.index(match[2])) if match[2] in NUMBERS else match[2]
        return match[1], frozenset({f"base {base}"})
    match = re.fullmatch(QUANTITY, text, re.DOTALL)
    if not match:
        return text, frozenset()
    value, gap, rest = match.groups()
    explicit = re.match(r"\\text|[%°\u4e00-\u9fff]", rest)
    gap = gap or rest.startswith((r"\frac", r"\Omega"))
    rest = re.sub(r"\^\{?-?\d\}?|\\(?:text|cdot|frac)", " ", rest)
    rest = re.sub(r"\\mu\s*", "μ", rest)
    rest = re.sub(r"(?<![^\W\d_])([kM]?)\s*\\Omega", r"\1Ω", rest)
    words = re.findall(r"[^\W\d_]+|\d+|[%°]", rest)
    if not words or re.search(r"[^\w\s{}()/.%°*]", rest):
        return text, frozenset()
    known = all(unit(word)[1] for word in words) and (gap or len(words[0]) > 1)
    english = gap and re.fullmatch("[A-Z]?[a-z]{2,}", words[0]) and re.search("[aeiou]", words[0])
    if not (explicit or known or english):
        return text, frozenset()
    return value.strip(), frozenset(unit(word)[0] for word in words) - SMALL_WORDS


def same_quantity(a, b):
    """Are values and units the same? One side may have fewer words: 3 is "3 cups of flour"."""
    (value, words), (other_value, other_words) = quantity(a), quantity(b)
    if not words | other_words or not (words <= other_words or other_words <= words):
        return False
    for word in words ^ other_words:
        if word in QUALIFIERS or word.isdigit():
            return False
    return plain(value) == plain(other_value) or same_expression(value, other_value)


# ------------------------------------------------------------------------------ relations

EQUAL = r"=|\\(?:approx|equiv|in)(?![a-z])"
RELATION = rf"{EQUAL}|<|>|\\(?:le|ge|ne)(?![a-z])"
TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}


def is_name(text):
    """Is it a quantity that an answer may name, as x, f(2), P(X=1), AB and m+n?

    What has numbers in it, as 2x+1 or x^2, is none: x^2=25 does not say 25."""
    if not re.search(r"[^\W\d_]", text) or text.startswith(("-", "+")) or is_constant(text):
        return False
    rest = re.sub(r"(?<=[\w}'])\([^()]*\)|_\{[^{}]*\}|_\w|\\text\{[^{}]*\}", "", text)
    return not re.search(r"[\d^]", rest)


@functools.lru_cache(maxsize=10_000)
def sides(text):
    """(name, values) of an answer: ("x", ["2+3", "5"]) of x = 2+3 = 5, and ("", ["5"]) of 5.
    None of an equation that names nothing."""
    parts, _ = split(text, EQUAL)
    if len(parts) == 1:
        return "", parts
    names = [part for part in parts if is_name(part)]
    if len(names) == len(parts):
        return names[0], parts[1:]
    rest = [part for part in parts if part not in names]
    if not names and not all(is_constant(part) for part in rest):
        return None
    return (names or [""])[0], rest


def upwards(text):
    """(parts, signs) of a relation, with < in the place of >."""
    parts, signs = split(text, RELATION)
    if ">" in signs or r"\ge" in signs:
        parts, signs = parts[::-1], [TURNED.get(sign, sign) for sign in signs[::-1]]
    return parts, signs


def as_interval(text):
    r"""An inequality for one thing as an interval: r"x\in(1,\infty)" of x>1."""
    parts, signs = upwards(text)
    names = [part for part in parts if is_name(part)] if signs else []
    if signs == [r"\ne"] and len(names) == 1:
        end = parts[1] if parts[0] in names else parts[0]
        return rf"{names[0]}\in(-\infty,{end})\cup({end},\infty)"
    if len(parts) == 2 and names == parts[:1]:
        parts, signs = [r"-\infty", *parts], ["<", *signs]
    elif len(parts) == 2 and names == parts[1:]:
        parts, signs = [*parts, r"\infty"], [*signs, "<"]
    if len(parts) != 3 or parts[1] not in names or not set(signs) <= {"<", r"\le"}:
        return text
    opening, closing = "[" if signs[0] == r"\le" else "(", "]" if signs[1] == r"\le" else ")"
    return rf"{parts[1]}\in{opening}{parts[0]},{parts[2]}{closing}"


def same_relation(a, b):
    """Is every step of a chain of equations or inequalities the same, up to a factor?"""
    (parts, signs), (other_parts, other_signs) = upwards(a), upwards(b)
    if signs != other_signs or not signs:
        return False
    for i, sign in enumerate(signs):
        step = f"({parts[i + 1]})-({parts[i]})"
        other_step = f"({other_parts[i + 1]})-({other_parts[i]})"
        if not proportional(step, other_step, positive=sign in ("<", r"\le")):
            return False
    return True


# ---------------------------------------------------------------------------------- items

TABLE = r"\\begin\{((?:[bpB]|small)?matrix|array|cases|aligned?)\}(.*)\\end\{\1\}"
NEXT_ROW = r"\\\\(?:\[[^]]*\])?"


def commas(text, bracketed=False):
    """A pattern of the commas that separate items: of 1,000, 2,000 only the second."""
    grouped = not re.search(r",(?! |\d{3}(?!\d))", text)
    thousands = grouped and (", " in text or not bracketed)
    return r",(?!\d{3}(?!\d))" if thousands else ","


def items_of(text, bracketed=False):
    """The parts of a text between ; or else between commas."""
    parts, signs = split(text, r";|\\cup(?![a-z])")
    return parts if signs else split(text, commas(text, bracketed))[0]


def of_either_sign(text):
    r"""[text], or the two that it is with \pm."""
    if r"\pm" not in text and r"\mp" not in text:
        return [text]
    plus = text.replace(r"\pm", "+").replace(r"\mp", "-")
    return [plus, text.replace(r"\pm", "-").replace(r"\mp", "+")]


def table(kind, text):
    """A matrix with all its entries, or a system of equations with its rows."""
    text = re.sub(r"^\s*\{[^}]*\}", "", text)  # the columns of an array
    rows = [row.split("&") for row in re.split(NEXT_ROW, text) if row.strip()]
    entries = [entry.strip() for row in rows for entry in row]
    if "matrix" in kind or kind == "array":
        return f"matrix {len(rows)}x{len(entries) // max(1, len(rows))}", entries
    return ("list", entries) if len(entries) == len(rows) else None


@functools.lru_cache(maxsize=10_000)
def collection(text):
    """(kind, items) of a "list" (or set, or union), a tuple or interval "()", "(]", a "matrix
    2x1" or a ratio ":". None of anything else."""
    is_set = is_bracketed(text) and text.startswith(r"\{")
    inside = text[2:-2].strip() if is_set else text
    items = []
    for part in items_of(inside, bracketed=is_set):
        items += of_either_sign(part)
    if is_set or len(items) > 1:
        return "list", items if inside else []
    parts, signs = split(text, EQUAL)
    if signs == ["="] and parts[0].startswith("("):  # (x,y)=(1,2)
        names, found = collection(parts[0]), collection(parts[1])
        if names and found and names[0] == found[0] and len(names[1]) == len(found[1]):
            return found[0], [f"{name}={value}" for name, value in zip(names[1], found[1])]
    if match := re.fullmatch(TABLE, text, re.DOTALL):
        return table(match[1], match[2])
    parts, _ = split(text, ":")
    if len(parts) > 2:
        return ":", parts
    if not is_bracketed(text):
        return None
    inside = text[1:-1].strip()
    parts = items_of(inside, bracketed=True)
    if len(parts) == 1 or text[0] == "{":
        return collection(inside)
    return text[0] + text[-1], parts


def named(items):
    """The items as {name: item} where all have names of their own, as in x=1, y=2; else {}."""
    names = {}
    for item in items:
        found = sides(as_interval(item))
        names[found[0] if found else ""] = item
    return names if len(names) == len(items) and "" not in names else {}


def same_in_order(items, others):
    return all(same(item, other) for item, other in zip(items, others))


def same_in_any_order(items, others):
    left, changed = list(others), []
    for item in items:  # the quick ones first
        if item in left:
            left.remove(item)
        else:
            changed.append(item)
    for item in changed:
        found = next((other for other in left if same(item, other)), None)
        if found is None:
            return False
        left.remove(found)
    return True


def same_items(answer, box):
    """Two collections. A box may leave out the brackets of a tuple: (1,2,3) is "1, 2, 3"."""
    (kind, items), (box_kind, box_items) = answer, box
    if len(items) != len(box_items):
        return False
    names, box_names = named(items), named(box_items)
    unordered = kind == box_kind == "list" and not names and not box_names
    if unordered or (names and box_names):
        return same_in_any_order(items, box_items)
    is_vector = "()" in (kind, box_kind) and re.search("1x|x1", kind + box_kind)
    is_tuple = (kind, box_kind) == ("()", "list") and not box_names
    if kind == box_kind or is_vector or is_tuple:
        if same_in_order(items, box_items):
            return True
    by_name = [names[name] for name in sorted(names)] or items
    box_by_name = [box_names[name] for name in sorted(box_names)] or box_items
    return bool(names or box_names) and same_in_order(by_name, box_by_name)


# -------------------------------------------------------------------------------- answers

DECIMAL = r"-?\d+[.,](?!\d{3}$)\d+"  # 2,5 is 2.5; 1,000 is not 1.000
MODULO = r"(.*?)(?:\\pmod\{(\w+)\})?\s*"


@functools.lru_cache(maxsize=100_000)
def same(answer, box):
    """Do two normalised answers mean the same?"""
    if plain(answer) == plain(box):
        return plain(answer) != ""
    answer, modulus = re.fullmatch(MODULO, answer, re.DOTALL).groups()
    box, box_modulus = re.fullmatch(MODULO, box, re.DOTALL).groups()
    if modulus or box_modulus:
        return modulus == box_modulus and same(answer, box)
    if same_relation(answer, box):
        return True
    answer, box = as_interval(answer), as_interval(box)
    items, box_items = collection(answer), collection(box)
    if re.fullmatch(DECIMAL, answer) and answer.replace(",", ".") == box.replace(",", "."):
        return True
    if items and len(items[1]) == 1:  # {5} is 5
        return same(items[1][0], box)
    if box_items and len(box_items[1]) == 1:
        return same(answer, box_items[1][0])
    if items and box_items:
        return same_items(items, box_items)
    says, box_says = sides(answer), sides(box)
    if says and box_says:
        (name, found), (box_name, box_found) = says, box_says
        if name and box_name and plain(name) != plain(box_name):
            return False
        if name or box_name or len(found + box_found) > 2:
            return any(same(value, box_value) for value in found for box_value in box_found)
    if items or box_items or (is_word(answer) and is_word(box)):
        return False
    return same_expression(answer, box) or same_quantity(answer, box)


def letter_and_text(answer):
    """Of a multiple choice: "(B) 12" -> ("B", "12"), and "(B)" -> ("B", None)."""
    match = re.fullmatch(CHOICE, answer, re.DOTALL)
    return match.groups() if match else (None, None)


@functools.lru_cache(maxsize=100_000)
def same_answer(answer, box):
    """Do a problem's answer and the one in a box (strings) mean the same?"""
    if len(answer) + len(box) > LONGEST:  # a response gone astray
        return answer.strip() == box.strip()
    answer, box = normalise(answer), normalise(box)
    (letter, text), (box_letter, box_text) = letter_and_text(answer), letter_and_text(box)
    if letter and box_letter:
        if letter != box_letter or not text or not box_text:
            return letter == box_letter
    try:
        return same((text or answer).strip(), (box_text or box).strip())  # (B) 12 is 12, too
    except RecursionError:  # hundreds of brackets in one another
        return False
