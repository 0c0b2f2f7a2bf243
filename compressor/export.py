"""Model -> ONNX: the first way of torch whose file is valid, within limits, and right."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from compressor.containers import leaves_in, map_tensors, tensors_in
from compressor.errors import ExportError, MeasurementError
from compressor.exporter import (
    DEFAULT_OPSET,
    NEWEST_OPSET,
    Limits,
    Way,
    inputs_in,
    refused,
    ways,
    written,
)
from compressor.files import write_whole
from compressor.latency.onnxruntime import answers_of
from compressor.rows import nothing_in, told_kind
from compressor.running import buffers_kept, cloned, reads
from compressor.template import make_template
from compressor.values import FORWARD_FAILURES, Branch, Example, Target, call

# Of a number, and of the largest beside it: what sums in another order cost in deep networks.
TOLERANCE, OF_LARGEST = 1e-3, 2e-4
MANY_DRAWN = 8  # inputs that a network is asked which reads numbers into Python
MAX_ELSEWHERE = 0.01  # of whole numbers: positions of equal values, roundings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Questions:
    """What a file is compared by.

    Attributes:
        asked: (input, what the network returns for it); the example is the first.
        place: " (FILE, line N)" where the network reads numbers into Python; "" for nowhere.
    """

    asked: tuple[tuple[Example, Any], ...]
    place: str = ""


def candidate_writer(
    model: nn.Module,
    example_input: Example,
    pruned: nn.Module,
    *,
    opset: int | None = None,
    target: Target | None = None,
    branches: Sequence[Branch] = (),
) -> Callable[[nn.Module], bytes]:
    """What turns pruned versions of `model` into ONNX files: its template where that is exact.

    A template fits unless sizes that follow the widths are written into the graph. Which it is,
    is tried: filled with `pruned` it must be byte for byte what a fresh export of `pruned` is.
    Where it is not, every version is exported and compared with torch, as by `export_onnx`.

    Args:
        model: In eval mode.
        example_input: As the model takes it, of the batch size wanted.
        pruned: `model` with channels removed from every group.
        opset: As for `export_onnx`.
        target: As for `export_onnx`.
        branches: Residual branches that versions may lack; `pruned` has them all.

    Raises:
        ExportError: `model` or `pruned` cannot be exported at all.
    """
    limits = _limits(opset, None, target)
    _, way = _file(model, example_input, limits)
    try:
        template = make_template(model, example_input, way=way, branches=branches)
        fresh = make_template(pruned, example_input, way=way, branches=branches)
    except ExportError as err:
        logger.info("candidates are exported one by one: %s", err)
    else:
        if template.fill(pruned) == fresh.fill(pruned):
            return template.fill
        logger.info("candidates are exported one by one: the graph has sizes written into it")
    return lambda candidate: _checked(
        candidate, example_input, _questions(candidate, example_input), way, limits
    )


def export_onnx(
    model: nn.Module,
    example_input: Example,
    path: Path,
    *,
    opset: int | None = None,
    max_ir: int | None = None,
    target: Target | None = None,
) -> Path:
    """Writes `model` as one ONNX file with the example's static shape, batch-norm folded.

    Where torch's first exporter lacks an operation in the operator set that is written otherwise,
    a newer set is taken, then torch's second exporter, within what may be read. Every file is
    compared with torch. Numbers of Python in what the network takes and returns are constants:
    the file has tensors only.

    Args:
        model: In eval mode; it is not changed.
        example_input: `(batch, c, h, w)`; a tuple or dict where the model takes several inputs.
        path: Written whole or not at all.
        opset: The one operator set that may be written, 9 to 20. None takes that of `target`, or
            13; and newer ones, up to what `target` reads or 20, for operations that it lacks.
        max_ir: Newest IR version of the file format that its reader knows; None takes that of
            `target`, or any.
        target: What is to read the file.

    Returns:
        `path`.

    Raises:
        ExportError: The network has an operation that cannot be written (the message names it and
            its place), or what came out has another opset, a newer IR, or tensors in a second
            file, or answers unlike the network; or `target` does not read `opset`.
    """
    with buffers_kept(model):
        content, _ = _file(model, example_input, _limits(opset, max_ir, target))
    return write_whole(path, content)


def check_exportable(model: nn.Module, example_input: Example, target: Target) -> int:
    """The opset in which `export_onnx` writes `model` for `target`; nothing is written.

    Raises:
        ExportError: As `export_onnx`.
    """
    with buffers_kept(model):
        return _file(model, example_input, _limits(None, None, target))[1].opset


def _limits(opset: int | None, max_ir: int | None, target: Target | None) -> Limits:
    if target is None:
        return Limits(opset or DEFAULT_OPSET, opset or NEWEST_OPSET, max_ir)
    if opset is not None and opset > target.max_opset:
        raise ExportError(
            f"{target.name} reads opset {target.max_opset} at most; got opset={opset}."
        )
    known = [each for each in (max_ir, target.max_ir) if each is not None]
    return Limits(opset or target.opset, opset or target.max_opset, min(known), target.name)


def _file(model: nn.Module, example: Example, limits: Limits) -> tuple[bytes, Way]:
    """The file of `model`, and how it was written: the first way whose file is right."""
    questions, refusals = _questions(model, example), list[ExportError]()
    for way in ways(limits, refusals):
        try:
            return _checked(model, example, questions, way, limits), way
        except ExportError as err:
            logger.info("%s", err)
            refusals.append(err)
    raise refused(model, example, limits, refusals)


def _checked(
    model: nn.Module,
    example: Example,
    questions: Questions,
    way: Way,
    limits: Limits,
) -> bytes:
    """The file of `model`, valid, within `limits`, and answering `questions` like the network."""
    name, answer = type(model).__name__, questions.asked[0][1]
    content = written(model, example, answer, way, fold=True)
    file = onnx.load_from_string(content)
    try:
        onnx.checker.check_model(file, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        reason = str(err).splitlines()[0]
        raise ExportError(f"{name} gives an ONNX file that is not valid: {reason}") from err
    opsets = {entry.domain: entry.version for entry in file.opset_import}
    if opsets != {"": way.opset}:
        raise ExportError(f"Asked for ONNX opset {way.opset}; the exporter wrote {opsets}.")
    if limits.max_ir is not None and file.ir_version > limits.max_ir:
        raise ExportError(
            f"The file has IR version {file.ir_version}; expected <= {limits.max_ir}."
        )
    if any(tensor.external_data for tensor in file.graph.initializer):
        raise ExportError("The exporter put tensors into a second file; expected one file.")
    _check_answers(model, questions, content)
    return content


def _questions(model: nn.Module, example: Example) -> Questions:
    """The example, and numbers drawn like it; more of them where Python code looks at numbers.

    The exporter drops what it does not follow (writes into views of tensors, ways that the code
    did not take for the example) without a word. The numbers are drawn between the example's
    least and largest, so that an example of zeros tells something too.
    """
    generator = torch.Generator().manual_seed(0)
    fault = nothing_in(example)
    try:
        with torch.no_grad(), reads() as read:
            asked = [(example, call(model, cloned(example)))]
    except FORWARD_FAILURES as err:
        said = next(iter(str(err).strip().splitlines()), "no message")
        fault = f"it does not take {told_kind(example)}: {type(err).__name__}: {said}"
    if fault is not None:
        raise ExportError(f"{type(model).__name__} cannot be exported: {fault}.")
    for _ in range(MANY_DRAWN if read.values else 1):
        with torch.no_grad():
            drawn = map_tensors(partial(_drawn_like, generator), example)
        try:
            with torch.no_grad():
                asked.append((drawn, call(model, cloned(drawn))))
        except FORWARD_FAILURES:
            name = type(model).__name__
            logger.info("%s takes no drawn numbers; the example alone is compared", name)
            break
    numbers = [repr([n for n in leaves_in(a) if not isinstance(n, Tensor)]) for _, a in asked]
    if len(set(numbers)) > 1:
        raise ExportError(
            f"{type(model).__name__} returns numbers of Python that follow its input, as of "
            f"tolist(), item() or float(); an ONNX file answers in tensors only. Return the "
            f"tensor they come from."
        )
    return Questions(tuple(asked), read.place)


def _check_answers(model: nn.Module, questions: Questions, content: bytes) -> None:
    """Raises `ExportError` where ONNX Runtime does not answer as the network does."""
    name = type(model).__name__
    of_whole = []  # faults of whole numbers: of equal values any may be the largest
    why = "write into a part of a tensor, choose by values, or draw at random"
    if questions.place:
        why = f"go by numbers that it reads into Python{questions.place}, as `if` and item() do"
    for given, answer in questions.asked:
        want = [tensor.detach() for tensor in tensors_in(answer)]
        try:
            tried = []
            for have in answers_of(content, inputs_in(model, given)):
                tried.append(list(_faults(want, have, why)))
                if not tried[-1]:
                    break
        except MeasurementError as err:
            raise ExportError(f"{name}, written to ONNX, could not be run: {err}") from err
        faults = tried[-1] and tried[0]
        others = [fault for fault, is_whole in faults if not is_whole]
        if others:
            raise ExportError(f"{name}, written to ONNX, {others[0]}")
        of_whole += [fault for fault, _ in faults[:1]]
    if len(of_whole) == len(questions.asked):
        raise ExportError(f"{name}, written to ONNX, {of_whole[0]}")


def _faults(
    want: Sequence[Tensor], have: Sequence[Tensor], why: str
) -> Iterator[tuple[str, bool]]:
    """(what is wrong with an answer, whether it is one of whole numbers)."""
    kinds = [[(tuple(t.shape), t.dtype) for t in side] for side in (want, have)]
    if kinds[0] != kinds[1]:
        yield f"returns {_told(have)}; expected {_told(want)}, as in torch.", False
        return
    for one, other in zip(want, have, strict=True):
        fault = _difference(one, other)
        if fault is not None:
            yield (
                f"answers unlike it does in torch: {fault}. Its forward pass may {why}. No file "
                f"was written.",
                not one.is_floating_point(),
            )


def _difference(want: Tensor, have: Tensor) -> str | None:
    """How two answers differ by more than sums in another order do; None where they do not."""
    if not want.is_floating_point() and not want.is_complex():
        share = float((want != have).double().mean()) if want.numel() else 0.0
        off = share > MAX_ELSEWHERE  # of equal values another one may be the largest
        return f"{share:.0%} of its whole numbers are others" if off else None
    finite = want.isfinite()
    if not torch.equal(finite, have.isfinite()):
        return "other numbers are NaN or infinite"
    want, have = want[finite].double(), have[finite].double()
    if not want.numel():
        return None
    errors, sizes = (want - have).abs(), want.abs()
    allowed = TOLERANCE * sizes + OF_LARGEST * sizes.max()
    worst = int((errors - allowed).argmax())
    if errors[worst] <= allowed[worst]:
        return None
    return f"{have[worst]:.5g} where it should be {want[worst]:.5g}"


def _told(answers: Sequence[Tensor]) -> str:
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype)[6:]}" for t in answers) or "nothing"


def _drawn_like(generator: torch.Generator, tensor: Tensor) -> Tensor:
    if not tensor.numel() or tensor.is_complex() or tensor.dtype == torch.bool:
        return tensor
    least, most = float(tensor.min()), float(tensor.max())
    if not tensor.is_floating_point():
        if tensor.dtype == torch.uint8:
            least, most = 0.0, 255.0
        drawn = torch.randint(int(least), int(most) + 1, tensor.shape, generator=generator)
        return drawn.to(tensor.dtype)
    if not math.isfinite(least) or not math.isfinite(most):
        return tensor
    drawn = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    return (drawn * ((most - least) or 1.0) + least).to(tensor.dtype)
