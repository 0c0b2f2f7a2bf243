"""What the text of a `.pt2` program may say: `models/model.json`, before torch interprets it.

torch.export.load gives strings of this file to four interpreters. Sizes go to sympy's `sympify`,
which evaluates them as Python. Names of values, arguments and weights are written into the source
of a `forward` that is compiled. Names of operators are looked up attribute by attribute. Enums in
the structure of inputs import the module that they name. So every string is held against what
such a string looks like in a program that torch.export wrote, and any other is refused.
"""

import ast
import re
from collections.abc import Mapping
from typing import Any

import torch

from compressor.errors import UntrustedModelError
from compressor.files import parsed_json


def _words(text: str) -> set[str]:
    return set(text.split())


NAME, DOTTED = re.compile(r"\w*"), re.compile(r"[\w.]*")
SYMBOL = re.compile(r"(s|u|zf|zuf)\d{1,9}", re.ASCII)
MAX_EXPRESSION = 20_000  # characters; a size of a detector of five levels has 2,000
MAX_INTEGER = 2**63
MAX_POWER = 8
POWERS = {"Pow", "PowByNatural"}
FUNCTIONS = POWERS | _words(
    """
    Symbol Integer Float Rational Add Mul Mod Max Min Abs floor ceiling And Or Not
    Equality Unequality Eq Ne Lt Le Gt Ge
    LessThan GreaterThan StrictLessThan StrictGreaterThan
    FloorDiv CeilDiv CleanDiv ModularIndexing Where PythonMod CeilToInt FloorToInt
    TruncToInt TruncToFloat RoundToInt ToFloat IntTrueDiv FloatTrueDiv Identity
    IsNonOverlappingAndDenseIndicator
    """
)
WORDS = {"true", "false", "int_oo", "oo"}
_EXPRESSIONS = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Load)
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.USub, ast.UAdd)
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_NODES = (*_EXPRESSIONS, *_ARITHMETIC, *_COMPARISONS)

_ON_NUMBERS = _words(
    "getitem add mul sub truediv ge le gt lt eq ne floordiv mod and_ or_ not_ pow neg pos abs"
)
_ON_SIZES = _words("int float ite max min not sqrt sum")
OPERATORS = {
    *(f"_operator.{name}" for name in _ON_NUMBERS),
    *(f"torch.sym_{name}" for name in _ON_SIZES),
    *(f"math.{name}" for name in ("ceil", "floor", "trunc")),
    "torch.ops.higher_order.wrap_with_set_grad_enabled",
    "torch.ops.higher_order.wrap_with_autocast",
}
REGISTERED = re.compile(r"torch\.ops\.(aten|torchvision)\.(\w+)\.(\w+)", re.ASCII)
# Operators of aten whose strings choose among ways to calculate; of others (`from_file`, `save`)
# they name files.
TAKE_TEXT = _words(
    """
    _assert_async _assert_scalar _functional_assert_async _functional_assert_scalar
    _convolution_mode conv1d conv2d conv3d pad meshgrid einsum stft
    div div_ divide divide_ gelu gelu_ quantile nanquantile searchsorted segment_reduce
    index_reduce index_reduce_ scatter scatter_ scatter_reduce scatter_reduce_
    _linalg_eigh _linalg_svd linalg_cond linalg_eigh linalg_eigvalsh linalg_lstsq
    linalg_matrix_norm linalg_norm linalg_qr linalg_svd linalg_svdvals
    """
) | {f"fft_{way}fft{n}" for way in ("", "i", "r", "ir", "h", "ih") for n in ("", "2", "n")}

CONTAINERS = {
    None,
    "builtins.tuple",
    "builtins.list",
    "builtins.dict",
    "collections.OrderedDict",
    "collections.namedtuple",
    "torch.fx.immutable_collections.immutable_list",
    "torch.fx.immutable_collections.immutable_dict",
}
VERIFIERS = {"TRAINING", "ATEN", ""}
KEPT_METADATA = ("stack_trace",)  # names the line in messages; the rest is looked up by name
NUMBERS_IN_WORDS = {"Infinity", "-Infinity", "NaN"}
OBJECTS = {"as_custom_obj", "custom_obj"}


def checked_program(where: str, content: bytes) -> dict[str, Any]:
    """What `models/model.json` says, without what torch would look up and nobody here needs.

    Args:
        where: File and member, for messages.
        content: The member.

    Raises:
        UntrustedModelError: A string in it is none of those that torch.export writes.
        ValueError: It is no JSON.
    """
    program = parsed_json(content)
    if not isinstance(program, dict) or not isinstance(program.get("graph_module"), dict):
        raise ValueError("models/model.json holds no program")
    program["guards_code"] = []
    program["graph_module"]["metadata"] = {}
    program.pop("torch_version", None)
    ranges = program.get("range_constraints")
    for symbol, bounds in ranges.items() if isinstance(ranges, dict) else ():
        if not SYMBOL.fullmatch(symbol) or not all(
            bound is None or type(bound) is int for bound in bounds.values()
        ):
            raise refused(where, f"{symbol}: {bounds}", "a range of a size")
    if not set(program.get("verifiers", ())) <= VERIFIERS:
        raise refused(where, str(program["verifiers"]), "a dialect of torch.export's")
    _check(where, "", program)
    return program


def refused(where: str, text: str, expected: str) -> UntrustedModelError:
    """The error for a text that is not on a list."""
    shown = text if len(text) <= 80 else f"{text[:77]}..."
    return UntrustedModelError(
        f"{where} says {shown!r} where {expected} was expected; torch would interpret it. Save "
        f"the program again with torch.export.save, or give --trust if you wrote the file."
    )


def _check(where: str, key: str, value: object) -> None:
    """Raises where a string in `value`, which lies under `key`, may be more than a name."""
    if key == "expr_str":
        _check_expression(where, value)
    elif isinstance(value, dict):
        for inner_key, inner in value.items():
            if not DOTTED.fullmatch(inner_key):
                raise refused(where, inner_key, "a name")
            if inner_key in OBJECTS:
                raise refused(where, inner_key, "a tensor or a number")
            if inner_key == "metadata" and isinstance(inner, dict):
                value[inner_key] = {k: str(inner[k]) for k in KEPT_METADATA if k in inner}
            else:
                _check(where, inner_key, inner)
    elif isinstance(value, list):
        for inner in value:
            _check(where, key, inner)
    elif isinstance(value, str):
        _check_text(where, key, value)
    elif key == "as_int" and type(value) is not int:
        raise refused(where, str(value), "an integer")


def _check_text(where: str, key: str, text: str) -> None:
    if key in ("target", "as_operator"):
        _check_operator(where, text)
    elif key in ("in_spec", "out_spec"):
        _check_structure(where, text)
    elif key in ("as_int", "as_float", "as_floats", "as_bool", "min_val", "max_val"):
        if key not in ("as_float", "as_floats") or text not in NUMBERS_IN_WORDS:
            raise refused(where, text, "a number")
    elif key in ("name", "as_name", "forward_arg_names"):
        if not NAME.fullmatch(text):
            raise refused(where, text, "a name")
    elif key not in ("as_string", "as_strings") and not DOTTED.fullmatch(text):
        raise refused(where, text, "a name")


def _check_expression(where: str, text: object) -> None:
    """Raises where the size `text` is more than arithmetic with integers and symbols."""
    expected = "a size (integers, symbols such as s12, + - * // %, Max, Min, comparisons)"
    if not isinstance(text, str) or len(text) > MAX_EXPRESSION or not text.isascii():
        raise refused(where, str(text), expected)
    try:
        tree = ast.parse(text, mode="eval")
        is_known = all(map(_is_arithmetic, _inner(tree)))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as err:
        raise refused(where, text, expected) from err
    if not is_known or "\n" in text or "#" in text:
        raise refused(where, text, expected)


def _inner(tree: ast.AST) -> list[ast.AST]:
    """Every node but those that `_is_arithmetic` has looked into: callees, and text."""
    found: list[ast.AST] = []
    ahead: list[ast.AST] = [tree]
    while ahead:
        node = ahead.pop()
        found.append(node)
        if isinstance(node, ast.Call):
            ahead += () if _called(node) in ("Symbol", "Float") else node.args
        else:
            ahead += ast.iter_child_nodes(node)
    return found


def _called(node: ast.AST) -> str:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id
    return ""


def _is_arithmetic(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return _is_known_call(node)
    if isinstance(node, ast.Name):
        return node.id in WORDS or SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float) and abs(node.value) < MAX_INTEGER
    return isinstance(node, _NODES)


def _is_known_call(node: ast.Call) -> bool:
    name = _called(node)
    texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
    if name == "Symbol":
        is_bool = all(
            isinstance(word.value, ast.Constant) and type(word.value.value) is bool
            for word in node.keywords
        )
        return is_bool and len(texts) == len(node.args) == 1 and _is_symbol(texts[0])
    if name == "Float":
        is_precise = all(
            word.arg in ("precision", "dps")
            and isinstance(word.value, ast.Constant)
            and type(word.value.value) is int
            and word.value.value <= 64
            for word in node.keywords
        )
        is_number = len(texts) == len(node.args) == 1 and re.fullmatch(
            r"-?[\d.]{1,40}(e[+-]?\d{1,3})?", str(texts[0]), re.ASCII
        )
        return is_precise and bool(is_number)
    if node.keywords or name not in FUNCTIONS:
        return False
    return name not in POWERS or _is_small_power(node)


def _is_symbol(value: object) -> bool:
    return isinstance(value, str) and SYMBOL.fullmatch(value) is not None


def _is_small_power(node: ast.Call) -> bool:
    """Whether a power has a small exponent and none below it: 9**9**9 never ends."""
    if len(node.args) != 2 or any(
        _called(inner) in POWERS for arg in node.args for inner in ast.walk(arg)
    ):
        return False
    power = ast.unparse(node.args[1])
    found = re.fullmatch(r"(?:Integer\()?(-?\d{1,3})\)?", power, re.ASCII)
    return found is not None and abs(int(found[1])) <= MAX_POWER


def _check_operator(where: str, target: str) -> None:
    """Raises unless `target` is an operator on tensors that an installed library registered."""
    if target in OPERATORS:
        return
    named = REGISTERED.fullmatch(target)
    if named is not None:
        library, name, overload = named.groups()
        for schema in torch._C._jit_get_schemas_for_operator(f"{library}::{name}"):
            if (schema.overload_name or "default") == overload:
                takes_text = any("str" in str(arg.type) for arg in schema.arguments)
                if not takes_text or name in TAKE_TEXT:
                    return
    raise refused(where, target, "an operator on tensors, such as torch.ops.aten.conv2d.default,")


def _check_structure(where: str, text: str) -> None:
    """Raises where the structure of inputs or outputs is not of plain containers."""
    if not text:
        return
    parsed = parsed_json(text)
    ahead = [parsed[1]] if isinstance(parsed, list) and len(parsed) == 2 else [None]
    while ahead:
        spec = ahead.pop()
        if not isinstance(spec, Mapping) or spec.get("type") not in CONTAINERS:
            raise refused(where, str(spec), "tuples, lists and dicts of inputs")
        context = spec.get("context")
        if isinstance(context, str) and not DOTTED.fullmatch(context):
            context = parsed_json(context)
        keys = context if isinstance(context, list) else [context]
        for key in keys:
            is_plain = key is None or type(key) is int
            if not is_plain and not (isinstance(key, str) and DOTTED.fullmatch(key)):
                raise refused(where, str(key), "the name of an input")
        ahead += spec.get("children_spec", ())
