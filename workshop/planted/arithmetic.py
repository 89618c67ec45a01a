"""Planted arithmetic: true statements about small numbers."""

from workshop.planted.dice import Dice


def arithmetic_document(dice: Dice) -> str:
    return "".join(statement(dice) + "\n" for _ in range(dice.between(6, 14)))


def statement(dice: Dice) -> str:
    """One true statement about numbers of up to three digits."""
    kind = dice.pick(("+", "+", "-", "*", "//", "/", "compare", "three"))
    a, b = number(dice), number(dice)
    if kind == "+":
        return f"{a} + {b} = {a + b}"
    if kind == "-":
        return f"{a} - {b} = {a - b}"
    if kind == "*":
        b = dice.between(0, 30)
        return f"{a} * {b} = {a * b}"
    if kind == "//":
        b = dice.between(2, 30)
        return f"{a} // {b} = {a // b}"
    if kind == "/":
        divisor, quotient = dice.between(2, 30), dice.between(1, 33)
        return f"{divisor * quotient} / {divisor} = {quotient}"
    if kind == "compare":
        return f"{a} {'<' if a < b else '>' if a > b else '=='} {b}"
    b, c = dice.between(2, 12), dice.between(2, 12)
    return dice.pick((f"{a} + {b} * {c} = {a + b * c}", f"({a} + {b}) * {c} = {(a + b) * c}"))


def number(dice: Dice) -> int:
    return dice.between(0, dice.pick((9, 99, 999)))


# Code
