"""Planted code: small functions of Python that run and end."""

from collections.abc import Sequence

from workshop.planted.dice import Dice


def split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FUNCTION_VERBS = split("get count find make build check compute collect update scan measure reduce")
FUNCTION_NOUNS = split("total score value items words result size limit price level index table step record")
FUNCTION_NAMES = [f"{verb}_{noun}" for verb in FUNCTION_VERBS for noun in FUNCTION_NOUNS]
NUMBER_NAMES = split("n m a b x y size limit start width height depth")
LIST_NAMES = split("values items numbers data rows scores prices points weights")
TEXT_NAMES = split("text word line name label message title key")
RESULT_NAMES = split("total result out answer found acc best count")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def code_document(dice: Dice) -> str:
    """One or two small functions; each runs, ends and may be followed by a line that uses it."""
    names = dice.sample(FUNCTION_NAMES, 2)
    bodies = (number_function, list_function, text_function, loop_function, choice_function, table_function)
    return "\n\n".join(dice.pick(bodies)(dice, name) for name in names[: dice.between(1, 2)])


def number_of(dice: Dice, names: Sequence[str], depth: int = 2) -> str:
    """An integer expression over `names` that cannot fail: it divides by positive constants alone."""
    left = dice.pick(names)
    if depth > 1 and dice.chance(0.4):
        left = f"({number_of(dice, names, depth - 1)})"
    if dice.chance(0.3):
        return f"{left} {dice.pick(('//', '%'))} {dice.between(2, 12)}"
    right = dice.pick([*(name for name in names if name != left), str(dice.between(1, 20))])
    operator = dice.pick(("+", "+", "-", "*"))
    if dice.chance(0.2):
        return f"abs({left} - {right})" if operator == "-" else f"{dice.pick(('max', 'min'))}({left}, {right})"
    return f"{left} {operator} {right}"


def condition(dice: Dice, name: str) -> str:
    return dice.pick(
        (
            f"{name} {dice.pick(('>', '<', '>=', '<=', '!='))} {dice.between(0, 50)}",
            f"{name} % {dice.between(2, 7)} == {dice.between(0, 1)}",
            f"{dice.between(0, 9)} < {name} < {dice.between(10, 60)}",
        )
    )


def usage(dice: Dice, name: str, *arguments: str) -> str:
    call = f"{name}({', '.join(arguments)})"
    line = dice.pick((f"{dice.pick(RESULT_NAMES)} = {call}", f"print({call})", ""))
    return f"\n\n{line}\n" if line else ""


def some_numbers(dice: Dice) -> str:
    return f"[{', '.join(str(dice.between(0, 60)) for _ in range(dice.between(2, 6)))}]"


def some_word(dice: Dice) -> str:
    return "".join(dice.pick(LETTERS) for _ in range(dice.between(2, 7)))


def number_function(dice: Dice, name: str) -> str:
    a, b = dice.sample(NUMBER_NAMES, 2)
    result = dice.pick(RESULT_NAMES)
    lines = [f"def {name}({a}, {b}):", f"    {result} = {number_of(dice, (a, b))}"]
    for _ in range(dice.between(0, 2)):
        lines.append(f"    {dice.pick((result, a, b))} = {number_of(dice, (a, b, result))}")
    lines.append(f"    return {number_of(dice, (result, a), 1)}")
    return "\n".join(lines) + "\n" + usage(dice, name, str(dice.between(0, 40)), str(dice.between(1, 40)))


def list_function(dice: Dice, name: str) -> str:
    values, result = dice.pick(LIST_NAMES), dice.pick(RESULT_NAMES)
    item = dice.pick(("x", "v", "item", "value"))
    new = number_of(dice, (item,))
    style = dice.pick(("sum", "append", "comprehension", "best"))
    if style == "comprehension":
        kept = f" if {condition(dice, item)}" if dice.chance(0.6) else ""
        wrap = dice.pick(("[{}]", "sum([{}])", "sorted([{}])", "len([{}])"))
        body = [f"    return {wrap.format(f'{new} for {item} in {values}{kept}')}"]
    else:
        start, step = {
            "sum": ("0", f"{result} {dice.pick(('+=', '-='))} {new}"),
            "append": ("[]", f"{result}.append({new})"),
            "best": (str(dice.between(0, 9)), f"{result} = {dice.pick(('max', 'min'))}({result}, {new})"),
        }[style]
        body = [f"    {result} = {start}", f"    for {item} in {values}:"]
        if dice.chance(0.6):
            body += [f"        if {condition(dice, item)}:", f"            {step}"]
        else:
            body += [f"        {step}"]
        body.append(f"    return {result}")
    return "\n".join([f"def {name}({values}):", *body]) + "\n" + usage(dice, name, some_numbers(dice))


def text_function(dice: Dice, name: str) -> str:
    text, result, letter = dice.pick(TEXT_NAMES), dice.pick(RESULT_NAMES), dice.pick(("c", "ch", "letter"))
    chosen = "".join(dice.sample(LETTERS, dice.between(1, 5)))
    style = dice.pick(("count", "replace", "method", "join"))
    if style == "method":
        change = dice.pick(("upper()", "strip()", "title()", f"replace({chosen[0]!r}, {some_word(dice)!r})"))
        extra = dice.pick((f" + {some_word(dice)!r}", "[::-1]", f"[:{dice.between(1, 9)}]", ""))
        body = [f"    {result} = {text}.{change}{extra}"]
    elif style == "join":
        separator = dice.pick((" ", "-", ", ", "_", ""))
        body = [
            f"    {result} = [{letter} for {letter} in {text} if {letter} {dice.pick(('in', 'not in'))} {chosen!r}]",
            f"    {result} = {separator!r}.join({result})",
        ]
    else:
        piece = str(dice.between(1, 5)) if style == "count" else dice.pick((letter, f"{letter}.upper()"))
        start = "0" if style == "count" else "''"
        body = [
            f"    {result} = {start}",
            f"    for {letter} in {text}:",
            f"        if {letter} {dice.pick(('in', 'not in'))} {chosen!r}:",
            f"            {result} += {piece}",
        ]
    body.append(f"    return {result}")
    return "\n".join([f"def {name}({text}):", *body]) + "\n" + usage(dice, name, repr(some_word(dice)))


def loop_function(dice: Dice, name: str) -> str:
    """A loop that ends: over a range, or while a number shrinks."""
    n, result = dice.pick(NUMBER_NAMES), dice.pick(RESULT_NAMES)
    body = [f"    {result} = {dice.between(0, 9)}"]
    if dice.chance(0.5):
        i = dice.pick(("i", "j", "k"))
        bounds = dice.pick((n, f"{dice.between(0, 3)}, {n}", f"0, {n}, {dice.between(2, 4)}"))
        body += [f"    for {i} in range({bounds}):"]
        body += [f"        {result} {dice.pick(('+=', '-='))} {number_of(dice, (i, n))}"]
    else:
        shrink = dice.pick((f"{n} -= {dice.between(1, 5)}", f"{n} //= {dice.between(2, 9)}"))
        body += [f"    while {n} > 0:", f"        {result} += {number_of(dice, (n,))}", f"        {shrink}"]
    body.append(f"    return {result}")
    return "\n".join([f"def {name}({n}):", *body]) + "\n" + usage(dice, name, str(dice.between(0, 40)))


def choice_function(dice: Dice, name: str) -> str:
    n = dice.pick(NUMBER_NAMES)
    answers = dice.sample(TEXT_NAMES + FUNCTION_NOUNS, 3) if dice.chance(0.5) else None
    results = [repr(word) for word in answers] if answers else [number_of(dice, (n,)) for _ in range(3)]
    lines = [f"def {name}({n}):", f"    if {condition(dice, n)}:", f"        return {results[0]}"]
    if dice.chance(0.6):
        lines += [f"    elif {condition(dice, n)}:", f"        return {results[1]}"]
    lines += dice.pick(([f"    return {results[2]}"], ["    else:", f"        return {results[2]}"]))
    return "\n".join(lines) + "\n" + usage(dice, name, str(dice.between(0, 60)))


def table_function(dice: Dice, name: str) -> str:
    values, key = dice.pick(LIST_NAMES), dice.pick("kvx")
    table = dice.pick(("table", "counts", "groups", "seen"))
    group = dice.pick((key, f"{key} % {dice.between(2, 9)}", f"{key} // {dice.between(2, 9)}"))
    lines = [f"def {name}({values}):", f"    {table} = {{}}", f"    for {key} in {values}:"]
    lines.append(f"        {table}[{group}] = {table}.get({group}, 0) + {number_of(dice, (key,), 1)}")
    result = dice.pick((table, f"sorted({table})", f"len({table})", f"max({table}, default=0)"))
    lines.append(f"    return {result}")
    return "\n".join(lines) + "\n" + usage(dice, name, some_numbers(dice))
