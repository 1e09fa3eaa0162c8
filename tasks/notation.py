r"""
One spelling for mathematics that models write in many ways.

    normalise(r"\text{Answer: } \dfrac{\pi}2")   # \frac{\pi}2
    normalise("x**2 ≤ pi/2")                     # x^2 \le  \pi /2

Wrappers, labels, fonts and sizes go; characters and plain words such as "pi" become commands.
"""
import functools
import re
import unicodedata


def spread(table):
    """{"a b": c} as {"a": c, "b": c}."""
    single = {}
    for names, value in table.items():
        single.update(dict.fromkeys(names.split(), value))
    return single


CHARACTERS = str.maketrans(spread({  # of several characters: what is read for them
    "\u2212 \u2013 \u2014 \u2010 \u2011": "-", "‘ ’ ′": "'", "“ ” \" `": "", "″": "''",
    "€ £ ¥ ￥ ₹": "$", "⟨ 〈": "(", "⟩ 〉": ")", "· ⋅ • ∙": r"\cdot ", "×": r"\times ",
    "÷": "/", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "≡": r"\equiv ",
    "∞": r"\infty ", "±": r"\pm ", "∓": r"\mp ", "√": r"\sqrt ", "∪": r"\cup ", "∈": r"\in ",
    "∅": r"\{\}", "∠": r"\angle ", "△": r"\triangle ", "ℝ": r"\mathbb{R}", "℃": "°C",
    "、 或 和": ",", "。": ".", "¢": " cents", "✓ ✔ ✅": "",
}))
COMMANDS = spread({  # of several commands: what is read for them
    "text textbf textit textrm textsf texttt textsc textnormal mbox hbox emph underline mathrm "
    "operatorname": r"\text",
    "mathbf boldsymbol bm bold mathit mathcal mathsf mathtt bf rm it boxed fbox left right bigl "
    "bigr big Big bigg Bigg Bigl Bigr displaystyle limits large Large small checkmark "
    "blacksquare": "",
    "quad qquad": " ", "dfrac tfrac cfrac": r"\frac", "dbinom tbinom": r"\binom",
    "leq leqslant leqq": r"\le ", "geq geqslant geqq": r"\ge ", "neq": r"\ne ", "lt": "<",
    "gt": ">", "vert lvert rvert mid": "|", "langle": "(", "rangle": ")", "lbrace": r"\{",
    "rbrace": r"\}", "varepsilon": r"\epsilon ", "vartheta": r"\theta ", "varphi": r"\phi ",
    "varrho": r"\rho ", "emptyset varnothing": r"\{\}", "dots ldots cdots dotsc": "…",
    "degree": "°", "prime": "'", "top intercal": "T", "imath": "i", "div": "/",
    "mod bmod": r"\pmod ", "R": r"\mathbb{R}",
})
FUNCTIONS = (  # and those of several arguments
    "arcsin arccos arctan arccot sinh cosh tanh sin cos tan cot sec csc log ln lg exp".split()
)
OF_SEVERAL = "max min gcd lcm".split()
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega"
).split()
WORDS = {  # in \text or without it
    **dict.fromkeys(["and", "or"], ","),
    **dict.fromkeys(["percent", "percentage", "pct"], "%"),
    **dict.fromkeys(["mod", "pmod"], r"\pmod "),
    **dict.fromkeys(["USD", "EUR", "GBP", "RMB"], ""),
    **dict.fromkeys(["inf", "infinity", "oo"], r"\infty "),
    **dict.fromkeys(["all real numbers", "all reals"], r"\mathbb{R}"),
    **{name: rf"\{name} " for name in (*GREEK, "pi", "sqrt")},
    **{f"a{name}": rf"\arc{name} " for name in ("sin", "cos", "tan")},
}
LABEL = (  # what stands in front of an answer
    r"^(\\text\{)?\s*(?i:(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:final |correct )?"
    r"(?:(?:answer|ans|result|solution|option|choice)(?: is\b| ?[:=])+|"
    r"(?:option|choice|选项?)(?=[ (:]*[A-J]\b))|答案(?:是|为)?):?\s*(?=.*\w)"
)


def word(match):
    r"""What is read for \text{...} or a plain word. Numbers and single letters lose \text."""
    inside, plain = match.groups()
    name, rest = (plain or inside).strip(), match.string[match.end() :]
    if name in WORDS:
        return WORDS[name]
    argument = r"\s*[\w(\\{|^]" if name in FUNCTIONS else r"\s*(\(|\\?\{)"  # none of 20 min
    if name in (*FUNCTIONS, *OF_SEVERAL) and re.match(argument, rest):
        return rf"\{name} "
    if plain:
        return plain
    inside = re.sub(r"(?i),?\s*\b(and|or)\b", ",", inside)
    if re.match(r"\s*[-+(]?\d", inside) or not re.search(r"[^\W\d_]{2}", inside):
        return f" {inside} "
    return rf"\text{{{name}}}"


def periodic(match):
    r"""0.1\overline{6} as a fraction: 16 - 1 of 90."""
    whole, first, period = match.groups()
    top = int(whole + first + period) - int("0" + whole + first)
    return rf"\frac{{{top}}}{{{10 ** len(first) * (10 ** len(period) - 1)}}}"


def vulgar(match):
    top, bottom = unicodedata.normalize("NFKC", match[0]).split("⁄")
    return rf" \frac{{{top}}}{{{bottom}}}"


def greek(match):
    size, name = unicodedata.name(match[0]).replace("LAMDA", "LAMBDA").split()[1::2]
    return rf"\{name.lower() if size == 'SMALL' else name.capitalize()} "


PATTERNS = [  # (pattern, replacement), applied from top to bottom
    # wrappers
    (r"(?<![\w)}])\*\*([^*]+)\*\*", r"\1"),
    (r"^\s*'(.*)'\s*$", r"\1"),
    (r"(?<!\\)\\[()\[\]]|\\?\$", ""),
    (r"\\(?:textcolor|colorbox|color)\s*\{\w*\}", ""),
    # spaces; those within 10\,000 and 10{,}000
    (r"(?<=\d)(?:\{,\}|,\\!) ?(?=\d{3})", ","),
    (r"(?<=\d)(?:\\[,;:! ]|[ ~])+(?=\d{3}(?!\d))", ""),
    (r"(?<!\\)\\[,;:!> ]|~|\s+", " "),
    # commands and words
    (r"\\(?:left|right)\s*\.", ""),
    (r"\\([A-Za-z]+)", lambda match: COMMANDS.get(match[1], match[0])),
    (rf"\\({'|'.join(FUNCTIONS)})(?=[a-z](?![a-z]))", r"\\\1 "),  # \cotx
    (r"(?<![\w}^\\])\{([A-Za-z])\}(?=['_^])", r"\1"),  # of \mathbf{v}_0
    (r"_\s*\{?\s*\\text\s*\{\s*([^{}]*?)\s*\}\s*\}?", r"_{\1}"),  # k_{\text{B}}
    (LABEL, r"\1"),
    (r"\b([ap])\.\s?m\b\.?", r"\1m"),
    (r"\\text\s*\{([^{}]*)\}|(?<![\\A-Za-z])([A-Za-z]+)(?![A-Za-z])", word),
    (r"\\%", "%"),
    (r"\.{3,}", "…"),
    # sets and relations
    (r"\\mathbb\s*(?:\{R\}|R)", r"(-\\infty,\\infty)"),
    (r"^\\\{\s*(\w)\s*(?:\\in[^|:]*)?[|:](.*)\\\}$", r"\2"),  # {x | x>1}
    (r"\(?\s*\\pmod\s*\{?\s*(\w+)\s*\}?\s*\)?", r"\\pmod{\1}"),
    ("<=", r"\\le "), (">=", r"\\ge "), (r"!=|\\not\s*=", r"\\ne "),
    # what is raised
    (r"\*\*", "^"),
    (r"\^\s*\{?\s*\\circ\s*\}?", "°"),
    (r"\^\{?('+)\}?", r"\1"),
    (r"\^\s*\{?\s*(?:\*|\\ast|\\star|\\dagger)\s*\}?", "_{*}"),
    # numbers
    (r"(?<=\d) ?[x×] ?(?=10\s*\^)", r"\\times "),
    (r"(?<![A-Za-z\d.])(\d+\.?\d*|\.\d+)[eE]([-+]?\d+)(?!\d)", r"\1\\times 10^{\2}"),
    (r"(?<![\d.}])(\d+) +(\d+)/(\d+)(?![\d.])", r"\1\\frac{\2}{\3}"),  # 1 1/2
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"(?<![\w.}^\\])(\d+)\s*(\\frac\{\d+\}\{\d+\})", r"(\1+\2)"),
    (r"(?<=\.)\((\d+)\)", r"\\overline{\1}"),  # 0.(3)
    (r"(?<=[.\d])\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?", r"\\overline{\1\2\3}"),
    (r"(?<=\.)(\d*?)(?:(\d)\2{2,}|(\d{2,}?)\3+)…", r"\1\\overline{\2\3}"),  # 0.333...
    (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?…?", periodic),
    # what is left at the ends
    (r"[\s\\.,;:]+$|^(?:\s|[=:,#]|\\(?:approx|therefore|implies|Rightarrow))+", ""),
    (r", *(?:, *)+", ","),
]


@functools.lru_cache(maxsize=10_000)
def normalise(answer):
    """One spelling for what is written in several ways, without wrappers and labels."""
    answer = answer.translate(CHARACTERS)
    answer = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", r"^{\g<0>}", answer)
    answer = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", r"_{\g<0>}", answer)
    answer = re.sub("[¼-¾⅐-⅞]", vulgar, answer)
    answer = re.sub("[Α-ΡΣ-Ωα-ρσ-ω]", greek, unicodedata.normalize("NFKC", answer))
    if r"\begin" not in answer:
        answer = answer.replace(r"\\", "\\")  # \\frac, and the end of a line
    for pattern, replacement in PATTERNS:
        answer = re.sub(pattern, replacement, answer)
    return answer.strip()
