r"""
The values of an expression in LaTeX at a few points, which are drawn once and for all.

    values(r"\frac{x^2-1}{x-1}")   # those of x+1, up to rounding
    values(r"\frac{1}{")           # None: what can't be read to its end has none

Two expressions are taken for the same if they agree at all points. That takes less than 1 ms,
where symbolic simplification takes seconds, and it always ends: nothing here needs a clock.
"""
import functools
import math
import operator
import random
import re
import threading
from fractions import Fraction

import mpmath

from tasks.notation import GREEK

mp = mpmath.mp.clone()  # a context of our own: its precision is nobody else's
mp.dps = 80  # digits
LOCK = threading.Lock()  # mpmath changes the precision of its context while it calculates
POINTS = 10
LARGEST = 10**9  # of exponents and arguments: what is larger could take for ever
LONGEST = 20_000  # bits of a fraction

ELEMENTARY = {
    "sin": mp.sin, "cos": mp.cos, "tan": mp.tan, "cot": mp.cot, "sec": mp.sec, "csc": mp.csc,
    "arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "arccot": mp.acot, "sinh": mp.sinh,
    "cosh": mp.cosh, "tanh": mp.tanh, "exp": mp.exp,
}
LOGARITHMS = {"ln": mp.e, "log": mp.mpf(10), "lg": mp.mpf(10)}  # and their bases
DECORATIONS = {rf"\{name}" for name in "overline bar vec hat dot ddot tilde widehat".split()}
SYMBOLS = {rf"\{name}" for name in (*GREEK, "ell", "hbar", "angle", "triangle", "nabla")}
POSITIVE = {"g", "h", "m", "r", r"\hbar", r"\epsilon", r"\mu", r"\rho"}  # and capital letters
CONSTANTS = {r"\pi": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1), r"\infty": mp.inf}
TOKEN = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+\.?\d*|\.\d+|\\[A-Za-z]+|\\.|\S")
GROUPS = {
    "(": ")", "[": "]", "{": "}", r"\{": r"\}", "|": "|", r"\lfloor": r"\rfloor",
    r"\lceil": r"\rceil",
}
AROUND = {"|": abs, r"\lfloor": mp.floor, r"\lceil": mp.ceil}  # other groups change nothing
TIMES = ("*", r"\cdot", r"\times")
NO_FACTOR = {"", *"+-/:^_!%°,=<>'", *TIMES, *GROUPS.values()} - {"|"}  # these begin none


class Unreadable(Exception):
    """No expression, or none that is known here, or one without a value at this point."""


# ---------------------------------------------------------------------------- arithmetic


def real(x):
    """A fraction as mpmath's number. By itself mpmath would make a float of it."""
    return mp.mpf(x.numerator) / x.denominator if isinstance(x, Fraction) else mp.mpmathify(x)


def bits(x):
    """The length of a fraction, or infinity for another number, which is not exact."""
    return (x.numerator * x.denominator).bit_length() if isinstance(x, Fraction) else math.inf


def is_integer(x):
    return isinstance(x, Fraction) and x.denominator == 1


def limited(x):
    if LARGEST < abs(x) < mp.inf:
        raise Unreadable("too large")
    return real(x)


def calculate(operation, a, b):
    """Exactly, as long as both are fractions that are short enough."""
    exact = bits(a) + bits(b) < LONGEST
    return operation(a, b) if exact else operation(real(a), real(b))


def power(base, exponent):
    limited(exponent)
    if is_integer(exponent) and abs(exponent) * bits(base) < LONGEST:
        return base ** int(exponent)
    return mp.power(real(base), real(exponent))


def root(degree, x):
    """Of a negative number the real root, where there is one."""
    if is_integer(degree) and degree % 2 == 1 and not isinstance(x, mp.mpc) and x < 0:
        return -root(degree, -x)
    return mp.power(real(x), 1 / real(degree))


def factorial(n):
    if is_integer(n) and 0 <= n <= 1000:
        return Fraction(math.factorial(int(n)))
    return mp.factorial(limited(n))


def binomial(n, k):
    if is_integer(n) and is_integer(k) and 0 <= k <= n <= 5000:
        return Fraction(math.comb(int(n), int(k)))
    return mp.binomial(limited(n), limited(k))


# -------------------------------------------------------------------------------- reading


class Reader:
    """Recursive descent, which calculates as it reads. A method reads what it is named after
    from self.place on, and returns its value: a fraction as long as that is exact."""

    def __init__(self, text, point):
        self.tokens, self.point = [*TOKEN.findall(text), "", "", ""], point
        self.place, self.bars = 0, 0  # of the next token; | that are still open

    def read(self):
        value = self.sum()
        if self.next:
            raise Unreadable(self.next)
        return value

    @property
    def next(self):
        return self.tokens[self.place]

    def take(self, *wanted):
        """The next token if it is one of those wanted, or any if none is named; else ""."""
        token = self.next
        if not token or (wanted and token not in wanted):
            return ""
        self.place += 1
        return token

    def expect(self, token):
        if not self.take(token):
            raise Unreadable(f"no {token}")

    def sign(self):
        return -1 if self.take("+", "-") == "-" else 1

    def begins_factor(self):
        if re.match(r"\.?\d", self.next):
            raise Unreadable("a number behind another factor")
        return self.next not in NO_FACTOR and not (self.next == "|" and self.bars)

    def sum(self):
        total = self.product()
        while sign := self.take("+", "-"):
            total = calculate(operator.add if sign == "+" else operator.sub, total, self.product())
        return total

    def product(self):
        if self.next in ("+", "-"):
            return self.sign() * self.product()
        start = self.place
        value = self.factors()
        while True:
            if self.take(*TIMES):
                value = calculate(operator.mul, value, self.sign() * self.factors())
            elif self.take("/", ":"):
                numbers = self.place == start + 2 and self.next[:1].isdigit()
                divisor = self.factor() if numbers else self.factors()  # 1/2x is x/2, a/2x not
                value = calculate(operator.truediv, value, divisor)
            elif self.begins_factor():
                value = calculate(operator.mul, value, self.factors())
            else:
                return value

    def factors(self):
        """Factors without a sign between them: 2xy."""
        value = self.factor()
        while self.begins_factor():
            value = calculate(operator.mul, value, self.factor())
        return value

    def factor(self):
        value = self.atom()
        while mark := self.take("!", "%", "°", "^"):
            if mark == "!":
                value = factorial(value)
            elif mark == "%":
                value = calculate(operator.truediv, value, Fraction(100))
            elif mark == "°":
                value = real(value) * mp.pi / 180
            else:
                value = power(value, self.sign() * self.atom())
        return value

    def atom(self):
        if self.next in GROUPS:
            return self.group()
        token = self.take()
        name = token.removeprefix("\\")
        if re.match(r"\.?\d", token):
            return Fraction(token.replace(",", ""))
        if token == r"\frac":
            return calculate(operator.truediv, self.argument(), self.argument())
        if token == r"\binom":
            return binomial(self.argument(), self.argument())
        if token == r"\sqrt":
            degree = self.group() if self.next == "[" else Fraction(2)
            return root(degree, self.atom())
        if token != name and (name in ELEMENTARY or name in LOGARITHMS):
            return self.function(name)
        if token in (r"\max", r"\min", r"\gcd", r"\lcm"):
            return self.function_of_several(name)
        if token in CONSTANTS and self.next != "_":
            return CONSTANTS[token]
        if token in DECORATIONS:
            return self.symbol(token + self.text())
        if re.fullmatch("[A-Za-z]", token) or token in SYMBOLS:
            return self.symbol(token)
        raise Unreadable(token)

    def group(self):
        opening = self.take()
        self.bars += opening == "|"
        value = self.sum()
        self.bars -= opening == "|"
        self.expect(GROUPS[opening])
        return AROUND[opening](real(value)) if opening in AROUND else value

    def argument(self):
        r"""A group, or one token; of a number only the first digit, as in \frac12."""
        number = self.next
        if number.isdigit():
            self.tokens[self.place : self.place + 1] = filter(None, [number[0], number[1:]])
        return self.atom()

    def text(self):
        """The tokens of a subscript, as they are."""
        if not self.take("{"):
            return self.take()
        start, depth = self.place, 1
        while depth and self.next:
            depth += {"{": 1, "}": -1}.get(self.take(), 0)
        return "".join(self.tokens[start : self.place - 1])

    def symbol(self, name):
        """A symbol with its subscripts and primes, or an unknown function such as f(x)."""
        while self.take("_"):
            name += "_" + self.text()
        while self.take("'"):
            name += "'"
        is_call = name[0] in "fgh" or self.tokens[self.place + 2] in (")", ",")
        if self.next == "(" and is_call:
            return self.unknown(name, self.several())
        return self.draw(name)

    def draw(self, name):
        """The value of a symbol: positive at the first points, then negative, then either. What
        physics names by capitals, and masses, radii and the like, stay positive."""
        draw = random.Random(f"{name} {self.point}")
        size = mp.mpf(draw.uniform(0.3, 3))
        negative = self.point == 3 or (self.point > 3 and draw.random() < 0.5)
        letter = name.partition("_")[0]
        return -size if negative and not (letter.isupper() or letter in POSITIVE) else size

    def unknown(self, name, arguments):
        return self.draw(f"{name} {[mp.nstr(real(x), 12) for x in arguments]}")

    def function(self, name):
        exponent, base, of = None, LOGARITHMS.get(name), ELEMENTARY.get(name)
        while mark := self.take("^", "_"):
            if mark == "^":
                exponent = self.sign() * self.atom()
            else:
                base = self.atom() if self.next == "10" else self.argument()
        if exponent == -1 and f"arc{name}" in ELEMENTARY:
            of, exponent = ELEMENTARY[f"arc{name}"], None
        x = self.group() if self.next in GROUPS else self.argument_without_brackets()
        value = of(limited(x)) if of else mp.log(real(x)) / mp.log(real(base))
        return value if exponent is None else power(value, exponent)

    def argument_without_brackets(self):
        r"""The product up to the next function or bracket: \sin 2x \cos x."""
        value = self.sign() * self.factor()
        while self.begins_factor() and self.next not in GROUPS:
            if self.next[1:] in ELEMENTARY or self.next[1:] in LOGARITHMS:
                break
            value = calculate(operator.mul, value, self.factor())
        return value

    def several(self):
        """The arguments of a function, in brackets."""
        opening = self.take("(", r"\{", "{")
        arguments = [self.sum()]
        while self.take(","):
            arguments.append(self.sum())
        self.expect(GROUPS.get(opening))
        return arguments

    def function_of_several(self, name):
        arguments = self.several()
        if name in ("max", "min"):
            return {"max": max, "min": min}[name](arguments, key=real)
        if not all(is_integer(x) for x in arguments):
            return self.unknown(name, arguments)
        return Fraction({"gcd": math.gcd, "lcm": math.lcm}[name](*map(int, arguments)))


@functools.lru_cache(maxsize=10_000)
def values(text):
    """The values of an expression at the points, None where it has none; None instead of them
    if it can't be read. A number has the same value at all points."""
    found = []
    for point in range(POINTS):
        try:
            with LOCK:
                value = Reader(text, point).read()
        except (Unreadable, ArithmeticError, ValueError, TypeError, RecursionError):
            value = None
        found.append(value if value == value else None)  # nan
    return found if any(value is not None for value in found) else None


def is_constant(text):
    found = values(text)
    return found is not None and all(value == found[0] for value in found)


# ------------------------------------------------------------------------------ comparison


def close(x, y):
    """Are two values the same up to rounding?"""
    exact = isinstance(x, Fraction) and isinstance(y, Fraction)
    if exact or x == y or mp.inf in (abs(x), abs(y)):
        return x == y
    x, y = real(x), real(y)
    if x == 0 or y == 0:
        return abs(x - y) < mp.mpf(10) ** -60
    return abs(x - y) <= mp.mpf(10) ** -50 * max(abs(x), abs(y))


def pairs(a, b):
    """The values of both where both are real; if there are no such points, at all points."""
    found = []
    for x, y in zip(values(a) or [], values(b) or []):
        if x is not None and y is not None:
            found.append((x, y))
    both_real = [xy for xy in found if not any(isinstance(value, mp.mpc) for value in xy)]
    return both_real or found


def rounds_to(decimal, number):
    """Is the first the second, rounded to 6 decimals or, if it is tiny, to 4 digits?

    A number that has no more decimals than that is not rounded: 0.9999999 is not 1."""
    x, y = values(decimal)[0], values(number)[0]
    if "." not in decimal or not isinstance(x, Fraction) or isinstance(y, mp.mpc):
        return False
    if x == 0 or abs(y) == mp.inf or y * 10**6 % 1 == 0:
        return False
    digits = max(6, 3 - int(mp.floor(mp.log10(abs(real(x))))))
    return abs(real(x) - real(y)) <= mp.mpf(10) ** -digits / 2


def same_expression(a, b):
    both = pairs(a, b)
    if not both:
        return False
    if all(close(x, y) for x, y in both):
        return True
    return is_constant(a) and is_constant(b) and (rounds_to(a, b) or rounds_to(b, a))


def proportional(a, b, positive):
    """Is one expression a constant times the other, as x-1 and 2x-2 are?"""
    ratios = []
    for x, y in pairs(a, b):
        if close(x, 0) or close(y, 0):
            return False
        ratios.append(real(x) / real(y))
    if not ratios or not all(close(ratio, ratios[0]) for ratio in ratios):
        return False
    return not positive or (not isinstance(ratios[0], mp.mpc) and ratios[0] > 0)
