"""`docs/api.md` from the docstrings of everything in `compressor.__all__`.

The package is read, not imported: griffe parses its source and its Google docstrings.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
PACKAGE = "compressor"
TOPICS = {  # what is in none of them comes under `REPORTS` or `OTHERS`
    "A whole run": (
        "load_config", "Config", "commented_toml", "compress", "compress_front", "resume",
        "replay", "read_result", "to_json", "load_compressed",
    ),
    "Single steps": (
        "load_model", "inspect_model", "channel_groups", "cost", "prune", "export_onnx",
        "check_exportable",
    ),
    "Devices and latency": (
        "load_target", "target_names", "who_answers", "open_device", "compare_latency",
        "explain", "probe_target",
    ),
    "What a run is told in": ("Result", "Verdict", "Trial", "Progress", "Plan"),
    "Errors": ("CompressorError",),
}  # fmt: skip
REPORTS, OTHERS, MENTIONED = "Texts and JSON", "More", "Mentioned above"
ALSO = ("tasks.Task",)  # named by users, though not imported from the package
HEAD = """# Python interface

<!-- Made by `make docs` from the docstrings; do not edit. -->

Everything that `import compressor` offers. The command line uses nothing else. A name is imported
when it is first used, so `import compressor` itself is quick. Examples are in
[recipes.md](recipes.md#from-python).
"""


def api_page() -> str:
    """The whole page.

    Raises:
        KeyError: A topic names what `__all__` has not.
    """
    package = griffe.load(PACKAGE, search_paths=[str(ROOT)], docstring_parser="google")
    assert isinstance(package, griffe.Module)
    topics = _topics([str(name) for name in package.exports or ()])
    found = {t: [_home(package, name) for name in names] for t, names in topics.items()}
    public = [entry for entries in found.values() for entry in entries]
    found[MENTIONED] = _mentioned(package, public)
    page = _Page([entry.name for entries in found.values() for entry in entries])
    lines = [HEAD, *_contents(found, page)]
    for topic, entries in found.items():
        lines += ["", f"## {topic}"]
        for entry in entries:
            lines += ["", *_entry(entry, page)]
    return "\n".join(lines) + "\n"


def _topics(names: list[str]) -> dict[str, list[str]]:
    """Topic -> names, each of `names` once."""
    found = {topic: list(members) for topic, members in TOPICS.items()}
    told = {name for members in found.values() for name in members}
    if told - set(names):
        raise KeyError(f"{PACKAGE}.__all__ has no {', '.join(sorted(told - set(names)))}.")
    left = [name for name in names if name not in told]
    found[REPORTS] = [name for name in left if name.endswith(("_report", "_json"))]
    found[OTHERS] = [name for name in left if name not in found[REPORTS]]
    return {topic: members for topic, members in found.items() if members}


def _home(package: griffe.Module, name: str) -> griffe.Object:
    """What `name` means, where it was written."""
    found = package[name]
    home = found.final_target if isinstance(found, griffe.Alias) else found
    assert isinstance(home, griffe.Object)
    return home


def _mentioned(package: griffe.Module, public: list[griffe.Object]) -> list[griffe.Object]:
    """Classes of the package in annotations of `public` that are not public themselves."""
    known = {entry.path for entry in public}
    found = {entry.path: entry for entry in (_home(package, name) for name in ALSO)}
    for entry in public:
        for path in _names_in(_annotations(entry)):
            inside = path.removeprefix(f"{PACKAGE}.")
            if inside == path or path in known or path in found:
                continue
            home = _home(package, inside)
            if isinstance(home, griffe.Class):
                found[path] = home
    return sorted(found.values(), key=lambda entry: entry.name.lower())


def _annotations(entry: griffe.Object) -> list[str | griffe.Expr | None]:
    if isinstance(entry, griffe.Function):
        return [entry.returns, *(parameter.annotation for parameter in entry.parameters)]
    return [attribute.annotation for attribute in entry.attributes.values()]


def _names_in(annotations: Iterable[str | griffe.Expr | None]) -> Iterator[str]:
    for annotation in annotations:
        if isinstance(annotation, griffe.Expr):
            for part in annotation.iterate(flat=True):
                if isinstance(part, griffe.ExprName):
                    yield part.canonical_path


class _Page:
    """Where each entry lies; GitHub makes anchors of headings, in lower case."""

    def __init__(self, names: list[str]) -> None:
        self.anchors: dict[str, str] = {}
        used: dict[str, int] = {}
        for name in names:
            slug = name.lower()
            n = used.get(slug, 0)
            used[slug] = n + 1
            self.anchors[name] = f"{slug}-{n}" if n else slug

    def linked(self, text: str, own: str = "") -> str:
        """`text` as one paragraph a blank line, with entries that it names linked."""
        text = "\n\n".join(" ".join(part.split()) for part in re.split(r"\n\s*\n", text))

        def link(match: re.Match[str]) -> str:
            name = match[1].rpartition(".")[2]
            anchor = self.anchors.get(name)
            return f"[`{match[1]}`](#{anchor})" if anchor and name != own else match[0]

        return re.sub(r"`([A-Za-z_.]+)`", link, text)


def _contents(found: dict[str, list[griffe.Object]], page: _Page) -> list[str]:
    return [
        f"* {topic}: {', '.join(f'[`{e.name}`](#{page.anchors[e.name]})' for e in entries)}"
        for topic, entries in found.items()
    ]


def _entry(entry: griffe.Object, page: _Page) -> list[str]:
    lines = [f"### `{entry.name}`", ""]
    if entry.name not in (entry.package.exports or ()):
        lines += [f"`{entry.path}`", ""]
    lines += _told(entry, page)
    if isinstance(entry, griffe.Class):
        lines += _fields_left(entry)
        if entry.path.removeprefix(f"{PACKAGE}.") in ALSO:
            for method in entry.functions.values():
                lines += [f"#### `{entry.name}.{method.name}`", "", *_told(method, page)]
        else:
            lines += _members(entry, page)
    if entry.name == "CompressorError" and entry.module.docstring:
        lines += ["```text", _tree(entry.module.docstring.value), "```", ""]
    return lines[:-1]


def _told(entry: griffe.Object, page: _Page) -> list[str]:
    """Its head, if it has one, and its docstring."""
    lines = []
    if isinstance(entry, griffe.Function):
        lines += ["```python", _stub(entry), "```", ""]
    for section in entry.docstring.parsed if entry.docstring else ():
        lines += _section(section, entry, page)
    return lines


def _stub(function: griffe.Function) -> str:
    """Its head as Python that runs: a default that is no literal is `...`."""
    parts, is_star_written = [], False
    for parameter in function.parameters:
        if parameter.kind is griffe.ParameterKind.keyword_only and not is_star_written:
            parts.append("*")
            is_star_written = True
        annotation = f": {parameter.annotation}" if parameter.annotation else ""
        default = "" if parameter.default is None else f" = {_literal(str(parameter.default))}"
        parts.append(f"{parameter.name}{annotation}{default}")
    returns = f" -> {function.returns}" if function.returns else ""
    line = f"def {function.name}({', '.join(parts)}){returns}: ..."
    if len(line) <= 88:
        return line
    inside = "".join(f"    {part},\n" for part in parts)
    return f"def {function.name}(\n{inside}){returns}: ..."


def _literal(default: str) -> str:
    try:
        value = ast.literal_eval(default)
    except (ValueError, SyntaxError):
        return "..."
    return f'"{value}"' if isinstance(value, str) else default


def _section(section: griffe.DocstringSection, entry: griffe.Object, page: _Page) -> list[str]:
    value = section.value
    match section.kind:
        case griffe.DocstringSectionKind.text:
            return [page.linked(value, entry.name), ""]
        case griffe.DocstringSectionKind.parameters:
            rows = [f"* `{p.name}`: {page.linked(p.description)}" for p in value]
            return ["Arguments:", "", *rows, ""]
        case griffe.DocstringSectionKind.attributes:
            return ["Attributes:", "", *(_attribute(a, entry, page) for a in value), ""]
        case griffe.DocstringSectionKind.returns:
            return [f"Returns: {page.linked(value[0].description)}", ""]
        case griffe.DocstringSectionKind.raises:
            rows = [f"* `{r.annotation}`: {page.linked(r.description)}" for r in value]
            return ["Raises:", "", *rows, ""]
    raise ValueError(f"{entry.path}: no way to print a section of kind {section.kind.value}.")


def _attribute(told: griffe.DocstringAttribute, entry: griffe.Object, page: _Page) -> str:
    """One row: name, type, default, meaning."""
    attribute = entry.attributes.get(told.name)
    kind = _kind(attribute) if attribute is not None else ""
    return f"* `{told.name}`{kind}: {page.linked(told.description)}"


def _kind(attribute: griffe.Attribute) -> str:
    if attribute.annotation is None:
        return ""
    value = None if attribute.value is None else _default(str(attribute.value))
    default = "" if value is None else f", default `{value}`"
    return f" (`{attribute.annotation}`{default})"


def _default(value: str) -> str | None:
    """The default that an attribute's right side states; None where it states none."""
    stated = re.search(r"\bdefault=((?:[^,()]|\([^()]*\))+)", value)
    if stated:
        return stated[1]
    return None if value.lower().startswith("field(") else value


def _fields_left(entry: griffe.Class) -> list[str]:
    """Fields that the docstring passes over, because their names say it all."""
    sections = entry.docstring.parsed if entry.docstring else []
    told = {
        field.name
        for section in sections
        if section.kind is griffe.DocstringSectionKind.attributes
        for field in section.value
    }
    left = [
        f"* `{name}`{_kind(attribute)}"
        for name, attribute in entry.attributes.items()
        if name not in told and attribute.annotation is not None and not name.startswith("_")
        and "property" not in attribute.labels
    ]  # fmt: skip
    return [f"{'Also' if told else 'Attributes'}:", "", *left, ""] if left else []


def _members(entry: griffe.Class, page: _Page) -> list[str]:
    """Members of an enumeration; methods and properties of other classes, a line each."""
    if any(str(base).endswith("Enum") for base in entry.bases):
        values = [f"* `{n}`: `{a.value}`" for n, a in entry.attributes.items()]
        return [*values, ""]
    rows = []
    for name, member in entry.members.items():
        if name.startswith("_") or not member.docstring or isinstance(member, griffe.Class):
            continue
        if isinstance(member, griffe.Function):
            arguments = ", ".join(p.name for p in member.parameters if p.name != "self")
            rows.append(f"* `{name}({arguments})`: {page.linked(_first(member))}")
        elif "property" in member.labels:
            rows.append(f"* `{name}`: {page.linked(_first(member))}")
    return ["Methods and properties:", "", *rows, ""] if rows else []


def _first(member: griffe.Object | griffe.Alias) -> str:
    assert member.docstring is not None
    return member.docstring.value.partition("\n\n")[0]


def _tree(docstring: str) -> str:
    """The indented part of the module's docstring."""
    lines = [line for line in docstring.splitlines() if line.startswith("    ")]
    return "\n".join(line[4:] for line in lines)
