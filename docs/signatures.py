"""An exported cell as documentation.

Sphinx directives with signatures, a table of what every parameter means, and the definition's own prose.

The comments beside parameters (docments) are read from the cell's source; nothing is imported and nothing is run.
"""

import ast
import io
import re
import tokenize

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
FIELDS = {"dataclass", "NamedTuple"}  # classes that are made of their fields


def comments(source: str) -> dict[int, str]:  # line -> the comment at its end, or else the one right above it
    lines, ends, above, pending = source.splitlines(), {}, {}, []
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type == tokenize.COMMENT and t.line.strip()[0] != "#":
            ends[t.start[0]] = t.string.lstrip("# ")
    for number, line in enumerate(lines, 1):
        code = line.strip()
        if code.startswith("# "):
            pending.append(code.lstrip("# "))
            continue
        if pending and code and not code.startswith(("def ", "class ", "@")):
            above[number] = " ".join(pending)
        pending = []
    return above | ends


def meaning(said: dict[int, str], node) -> str:  # of a parameter, field or constant
    return said.get(node.end_lineno) or said.get(node.lineno, "")


def plain(text: str) -> str:
    "Text that is not Markdown, for a cell of a Markdown table; code in backticks stays code."
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\*_<\[\]{}$~|])", r"\\\1", part) for part in parts[::2]]
    return "`".join([part if i % 2 == 0 else part.replace("|", r"\|") for i, part in enumerate(parts)])


def head_end(f: ast.FunctionDef) -> int:  # the line of the colon, whose comment is about what is returned
    first = min(x.lineno for x in f.body)
    return f.lineno if first == f.lineno else f.returns.end_lineno if f.returns else first - 1


def parameters(
    f: ast.FunctionDef, said: dict[int, str]
) -> list[tuple[str, str, str, str]]:  # name, type, default, meaning
    "Of a function as it is written, without self."
    a, rows = f.args, []
    plain_args = a.posonlyargs + a.args
    defaults = [None] * (len(plain_args) - len(a.defaults)) + a.defaults
    named = (
        [("", x, d) for x, d in zip(plain_args, defaults)]
        + ([("*", a.vararg, None)] if a.vararg else [])
        + [("", x, d) for x, d in zip(a.kwonlyargs, a.kw_defaults)]
        + ([("**", a.kwarg, None)] if a.kwarg else [])
    )
    for stars, x, d in named:
        if x.arg in ("self", "cls") and x is plain_args[0]:
            continue
        line = (d or x).end_lineno
        comment = said.get(line) or said.get(x.lineno, "")
        rows.append(
            (
                stars + x.arg,
                ast.unparse(x.annotation) if x.annotation else "",
                ast.unparse(d) if d else "",
                "" if line == head_end(f) else comment,
            )
        )
    return rows


def table(rows: list[tuple[str, str, str, str]]) -> list[str]:  # lines of Markdown
    "What every parameter means; types and defaults stand in the signature."
    told = [(name, text) for name, _, _, text in rows if text]
    if not told:
        return []
    return ["", "|  | meaning |", "|---|---|", *(f"| `{name}` | {plain(text)} |" for name, text in told), ""]


def signature(f: ast.FunctionDef) -> str:
    args = ast.unparse(f.args)
    if f.args.args and f.args.args[0].arg in ("self", "cls"):
        args = re.sub(r"^(self|cls)(: [^,]*)?(, )?", "", args)
    return f"({args})" + (f" -> {ast.unparse(f.returns)}" if f.returns else "")


def directive(kind: str, head: str, body: list[str], depth: int, options: tuple[str, ...] = ()) -> list[str]:
    fence = "`" * (9 - depth)
    return [f"{fence}{{py:{kind}}} {head}", *(f":{o}" for o in options), "", *body, fence, ""]


def function(f, said: dict[int, str], link, depth: int = 0) -> list[str]:  # lines of Markdown
    names = {ast.unparse(d).split("(")[0] for d in f.decorator_list}
    kind, options = (
        "method" if depth else "function",
        tuple(f"{o}:" for o in ("staticmethod", "classmethod") if o in names),
    )
    if "property" in names:
        kind = "property"
    rows = parameters(f, said)
    if returned := said.get(head_end(f)):
        rows.append(("returns", "", "", returned))
    head = f"{f.name}" if kind == "property" else f.name + signature(f)
    return directive(kind, head, [link(ast.get_docstring(f) or ""), *map(link, table(rows))], depth, options)


def a_class(c: ast.ClassDef, said: dict[int, str], link) -> list[str]:  # lines of Markdown
    "A class with its public methods."
    made = {ast.unparse(x).split("(")[0].rpartition(".")[2] for x in [*c.decorator_list, *c.bases]}
    methods = [m for m in c.body if isinstance(m, (ast.FunctionDef, ast.AsyncFunctionDef))]
    init = next((m for m in methods if m.name == "__init__"), None)
    rows, head = [], c.name
    if init:
        rows, head = parameters(init, said), c.name + signature(init)
    elif made & FIELDS:
        fields = [x for x in c.body if isinstance(x, ast.AnnAssign)]
        rows = [
            (
                x.target.id,
                ast.unparse(x.annotation),
                ast.unparse(x.value) if x.value else "",
                meaning(said, x),
            )
            for x in fields
        ]
        head += "(" + ", ".join(f"{n}: {t}" + (f" = {d}" if d else "") for n, t, d, _ in rows) + ")"
    inner = [line for m in methods if m.name[0] != "_" for line in function(m, said, link, 1)]
    return directive("class", head, [link(ast.get_docstring(c) or ""), *map(link, table(rows)), *inner], 0)


def constant(x, said: dict[int, str], link) -> list[str]:  # lines of Markdown
    value = ast.unparse(x.value)
    return directive(
        "data",
        name_of(x),
        [link(plain(meaning(said, x)))],
        0,
        (f"value: {value}",) if len(value) <= 120 else (),
    )


def only_imports(source: str) -> bool:  # also of a cell with nothing in it
    return not source.lstrip().startswith(("%", "!")) and all(
        isinstance(x, (ast.Import, ast.ImportFrom)) for x in ast.parse(source).body
    )


def name_of(x: ast.stmt) -> str:  # what a statement defines; empty for nothing, or for several names
    if isinstance(x, DEFINITIONS):
        return x.name
    target = x.targets[0] if isinstance(x, ast.Assign) else x.target if isinstance(x, ast.AnnAssign) else None
    return target.id if isinstance(target, ast.Name) else ""


def public(source: str) -> list:  # definitions of an exported cell that other modules may use, in order
    return [x for x in ast.parse(source).body if name_of(x) and name_of(x)[0] != "_"]


def names(source: str) -> list[str]:  # of what the cell defines, methods as Class.method
    found = []
    for x in public(source):
        found.append(name_of(x))
        if isinstance(x, ast.ClassDef):
            found += [f"{x.name}.{m.name}" for m in x.body if isinstance(m, ast.FunctionDef) and m.name[0] != "_"]
    return found


def document(
    source: str,  # An exported cell
    link=lambda text: text,  # Makes links of names in backticks
) -> str:  # MyST Markdown; empty where the cell defines nothing public
    "Every public definition of a cell as a directive of Sphinx's Python domain."
    said, lines = comments(source), []
    for x in public(source):
        lines += (a_class if isinstance(x, ast.ClassDef) else function if isinstance(x, DEFINITIONS) else constant)(
            x, said, link
        )
    return "\n".join(lines)
