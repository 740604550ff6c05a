#!/usr/bin/env python3
"""What one update costs with SAM in its forms, over a plain update: time, FLOPs, memory.

    python benchmarks/step_cost.py --model resnet50 --batch-size 8 --channels-last
    python benchmarks/step_cost.py --methods gsam msam looksam
    python benchmarks/step_cost.py --device cuda --amp --channels-last --batch-size 128 --markdown table.md

All forms run in one process on the same batch, in turns; a ratio is that of a form to the plain update of the same
round, reported as median with minimum and maximum. The two forms of each method take turns with a plain update of their
own, so that no more than a few copies of the model are there at a time. The FLOP bound is what torch.utils.flop_counter
counts in the form's update over what it counts in a plain one: no implementation that does this arithmetic can be
cheaper. What a form takes beside its forward and backward passes, over what a plain update does (the base optimizer's
step), is timed in the same updates: it is small, and unlike the ratio hardly moves with the machine's speed. The peer
is ``SAM`` of the package pytorch-optimizer, used as its documentation says (extra ``benchmark``).
"""
import argparse
import copy
import platform
import shlex
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_sam import SAM, compile_split, methods
from timm_sam.cli.errors import OptionError, report
from timm_sam.cli.parser import OptionParser

try:
    import pytorch_optimizer
except ImportError:
    pytorch_optimizer = None

# what --methods measures, with which arguments, and how many updates make one round of it: those of a period, of a
# whole run, or enough to meet the mean of what is drawn
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "usam": ({}, 1), "msam": ({}, 1), "friendly": ({}, 1), "stable": ({}, 1), "looksam": (dict(k=5, alpha=0.7), 5),
    "gsam": (dict(alpha=0.4), 1), "random_mask": (dict(sparsity=0.5), 1),
    "ssam_dynamic": (dict(sparsity=0.5, total_epochs=100), 1), "ssam_fisher": (dict(sparsity=0.5, samples=2), 1),
    "esam": (dict(beta=0.6, gamma=0.5), 8), "late": (dict(start=0.9, ramp=False, total_updates=10), 10)}
LATE = {"resnet50": "layer4", "vit_small_patch32_224": r"blocks\.(8|9|10|11)\."}


@dataclass
class Form:
    """One way to do an update."""

    name: str
    update: Callable[[], Any]
    model: nn.Module
    updates: int = 1  # of which time and FLOPs are the mean
    params: str = ""
    times: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)  # of the same updates, the seconds outside of the passes
    flops: int = 0
    memory: int = 0


@dataclass(frozen=True)
class Row:
    """What was measured of a form: seconds of an update, and over a plain one its time in each round, FLOPs, memory.

    ``beside`` are the seconds that it takes beside the passes and the base optimizer's step.
    """

    name: str
    seconds: float
    ratios: list[float]
    bound: float
    beside: float
    memory: float


class Passes:
    """Tells the time of forward and backward passes from that of all else in an update.

    Attributes:
        seconds: Of the passes in the last :meth:`timed` block.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device
        self._on = False

    @contextmanager
    def one(self) -> Iterator[None]:
        """Around a forward pass, whenever it is."""
        if not self._on:
            yield
            return
        synchronize(self._device)
        start = time.perf_counter()
        yield
        synchronize(self._device)
        self.seconds += time.perf_counter() - start

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around updates. Backward passes are known by the two functions of torch that begin them."""
        def known(function: Callable) -> Callable:
            def run(*args: Any, **kwargs: Any) -> Any:
                with self.one():
                    return function(*args, **kwargs)
            return run

        backward, grad = torch.autograd.backward, torch.autograd.grad
        torch.autograd.backward, torch.autograd.grad = known(backward), known(grad)  # type: ignore[assignment]
        self.seconds, self._on = 0.0, True
        try:
            yield
        finally:
            self._on = False
            torch.autograd.backward, torch.autograd.grad = backward, grad


def build_parser() -> OptionParser:
    parser = OptionParser(prog="step_cost.py", description="Measures the cost of SAM's forms over a plain update.")
    add = parser.add_argument
    add("--model", default="resnet50", help="model of timm")
    add("--batch-size", type=int, default=8, help="samples per update")
    add("--img-size", type=int, default=224, help="height and width in pixels")
    add("--late", default=None, metavar="REGEX", help="late norm layers; none: known for " + ", ".join(LATE))
    add("--device", default="cpu", help="cpu or cuda")
    add("--amp", action="store_true", help="autocast to bfloat16")
    add("--channels-last", action="store_true", help="channels-last memory layout")
    add("--torchcompile", action="store_true", help="compile with inductor, as train.py does")
    add("--rounds", type=int, default=15, help="times each form is measured")
    add("--repeats", type=int, default=None, metavar="N",
        help="updates to a time, one after another without waiting for the device; none: 1 on the CPU, 10 on others")
    add("--warmup", type=int, default=3, help="updates of each form before")
    add("--threads", type=int, default=None, help="threads of torch on the CPU; none: torch's choice")
    add("--forms", nargs="+", default=None, metavar="NAME", help="only these forms, by a part of their names")
    add("--methods", nargs="+", default=[], metavar="NAME", choices=tuple(METHODS),
        help="these methods too, each on all parameters and on normalization layers: " + ", ".join(METHODS))
    add("--markdown", default=None, metavar="FILE", help="write the table there, too, after each method")
    return parser


def build_forms(args: argparse.Namespace, device: torch.device, compiled: bool, method: str = "",
                passes: Passes | None = None) -> list[Form]:
    """Plain and the forms of a method, each with its own copy of the same model, on the same batch.

    Args:
        args, device: What is measured where.
        compiled: Whether by ``torch.compile``.
        passes: What times forward passes.
        method: A key of ``METHODS``; empty: the forms of SAM without one, and the peer.
    """
    torch.manual_seed(0)
    passes = passes or Passes(device)
    late = args.late or LATE.get(args.model)
    if late is None:
        raise OptionError(f"--late is missing: name the late norm layers of {args.model} by a regular expression")
    kwargs = {"img_size": args.img_size} if hasattr(timm.create_model(args.model), "patch_embed") else {}
    original = timm.create_model(args.model, **kwargs).to(device).train()
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    y = torch.randint(original.num_classes, (args.batch_size,), device=device)
    if args.channels_last:
        original, x = original.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    quarter = -(-args.batch_size // 4)

    def make(name: str, filter: str | None = None, fraction: int | None = None, updates: int = 1, **sam: Any) -> Form:
        model = copy.deepcopy(original)
        called: Callable = model
        if compiled and filter is not None and sam.get("share_forward", True):
            compile_split(model)
        elif compiled:
            called = torch.compile(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

        def loss(n: int | None = None) -> Tensor:
            with passes.one(), precision(args, device):
                return F.cross_entropy(called(x[:n]), y[:n])

        def losses(rows: Tensor | None = None) -> Tensor:
            with passes.one(), precision(args, device):
                inputs, labels = (x, y) if rows is None else (x[rows], y[rows])
                return F.cross_entropy(called(inputs), labels, reduction="none")

        def plain() -> None:
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

        if not sam:
            return Form(name, plain, model)
        wrapped = SAM(optimizer, called if isinstance(called, nn.Module) else model, filter=filter, **sam)
        ascent = None if fraction is None else lambda: loss(fraction)
        loss_fn = losses if wrapped.chooses_samples else loss
        # of the estimate of a mask only that it is made: it is no part of an update
        wrapped.begin(0, 0, lambda n: [lambda: F.cross_entropy(model.eval()(x[:1]), y[:1])] * n)
        model.train()

        def several() -> None:
            for update in range(updates):
                wrapped.begin(0, update)
                wrapped.minimize(loss_fn, ascent_fn=ascent)

        return Form(name, several, model, updates, sam.get("params", "onlynorm"))

    if method:
        options, updates = METHODS[method]
        slots = [(params, methods.METHODS[method](**options)) for params in ("all", "onlynorm")]
        return _chosen([make("plain"), *(
            make(f"{slot.name}, {params}", updates=updates, params=params, rho=0.05, method=slot)
            for params, slot in slots)], args.forms)
    forms = [
        make("plain"),
        make("SAM, all parameters", variant="sam", params="all", rho=0.05),
        make("SAM-ON", variant="sam", rho=0.5),
        make(f"late norm layers ({late}), two forwards", late, rho=0.5, share_forward=False),
        make(f"late norm layers ({late}), shared forward", late, rho=0.5),
        make("SAM-ON, ascent on a quarter of the batch", fraction=quarter, rho=0.5),
    ]
    if pytorch_optimizer is not None:
        forms.append(peer(original, x, y, args, device, compiled, passes))
    return _chosen(forms, args.forms)


def _chosen(forms: list[Form], parts: list[str] | None) -> list[Form]:
    return [f for i, f in enumerate(forms) if i == 0 or parts is None or any(part in f.name for part in parts)]


def precision(args: argparse.Namespace, device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if args.amp else nullcontext()


def peer(original: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace, device: torch.device,
         compiled: bool, passes: Passes) -> Form:
    """SAM of pytorch-optimizer, by the example of its documentation."""
    model = copy.deepcopy(original)
    called = torch.compile(model) if compiled else model
    optimizer = pytorch_optimizer.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=1e-4, momentum=0.9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with passes.one(), precision(args, device):
            loss = F.cross_entropy(called(x), y)
        loss.backward()
        return loss

    def update() -> None:
        closure()
        optimizer.step(closure)

    version = getattr(pytorch_optimizer, "__version__", "")
    return Form(f"peer: SAM of pytorch-optimizer {version}".rstrip(), update, model)


class SavedTensors:
    """Peak number of bytes that autograd keeps alive for backward passes, parameters not counted."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda box: box.tensor)

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        box = _Box(tensor)
        key = storage.data_ptr()
        if key not in self.parameters:
            self.alive[key] = self.alive.get(key, 0) + 1
            if self.alive[key] == 1:
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
            weakref.finalize(box, self._free, key, storage.nbytes())
        return box

    def _free(self, key: int, size: int) -> None:
        self.alive[key] -= 1
        if self.alive[key] == 0:
            self.now -= size


class _Box:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def measure_memory(form: Form, device: torch.device) -> int:
    """Peak bytes of one update: of CUDA's allocator above what is held between updates, else saved for backward."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        form.update()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    tracker = SavedTensors(form.model)
    with tracker.hooks():
        form.update()
    return tracker.peak


def count(form: Form) -> int:
    """FLOPs of an update, without those of the first, which checks the shared forward."""
    form.update()
    with FlopCounterMode(display=False) as counter:
        form.update()
    return round(counter.get_total_flops() / form.updates)


def measure(args: argparse.Namespace, device: torch.device) -> Iterator[list[Row]]:
    """All rows measured so far: of the forms of SAM, then of one method after the other."""
    rows: list[Row] = []
    for method in ("", *args.methods):
        plain, *others = measure_in_turns(args, device, method)
        for form in others if rows else (plain, *others):
            rows.append(Row(
                form.name, statistics.median(form.times), [t / p for t, p in zip(form.times, plain.times)],
                form.flops / plain.flops, statistics.median(form.beside) - statistics.median(plain.beside),
                form.memory / plain.memory))
        yield rows


def measure_in_turns(args: argparse.Namespace, device: torch.device, method: str) -> list[Form]:
    passes = Passes(device)
    counted = build_forms(args, device, compiled=False, method=method, passes=passes)
    for form in counted:
        form.flops = count(form)
        form.memory = measure_memory(form, device)
    forms = build_forms(args, device, True, method, passes) if args.torchcompile else counted
    for form, by_count in zip(forms, counted):
        form.flops, form.memory = by_count.flops, by_count.memory
        for _ in range(args.warmup):
            form.update()
        if args.torchcompile and device.type == "cuda":
            form.memory = measure_memory(form, device)
    for i in range(args.rounds):
        order = forms if i % 2 == 0 else forms[::-1]  # a drift of the machine's speed favours no form
        for form in order:
            if device.type != "cpu":  # telling the passes from the rest means waiting for the device
                form.times.append(timed(form.update, device, args.repeats) / form.updates)
            repeats = args.repeats if device.type == "cpu" else 1
            with passes.timed():
                seconds = timed(form.update, device, repeats)
            if device.type == "cpu":
                form.times.append(seconds / form.updates)
            form.beside.append((seconds - passes.seconds / repeats) / form.updates)
    return forms


def timed(update: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Seconds of one update; ``repeats`` of them run without waiting for the device, as in training."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        update()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def table(rows: list[Row], args: argparse.Namespace, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    kind = "allocated" if device.type == "cuda" else "saved for backward"
    options = [o for o, on in (("bf16 autocast", args.amp), ("channels last", args.channels_last),
                               ("torch.compile", args.torchcompile)) if on]
    lines = [
        f"`{args.model}`, batch {args.batch_size}, {args.img_size}x{args.img_size}, "
        f"{', '.join(options) or 'eager float32'}; {name}; torch {torch.__version__}, timm {timm.__version__}, "
        f"Python {platform.python_version()}; {args.rounds} rounds of {args.repeats} update(s)",
        "",
        "| update | time (ms) | ratio to plain: median (min-max) | FLOP bound | ratio / bound "
        f"| beside passes and base step (ms, % of plain) | peak memory {kind} |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratio = statistics.median(row.ratios)
        lines.append(
            f"| {row.name.replace('|', chr(92) + '|')} | {row.seconds * 1e3:.1f} "
            f"| {ratio:.3f} ({min(row.ratios):.3f}-{max(row.ratios):.3f}) "
            f"| {row.bound:.3f} | {ratio / row.bound:.3f} "
            f"| {row.beside * 1e3:.1f} ({row.beside / rows[0].seconds:.1%}) | {row.memory:.3f}x |")
    return "\n".join(lines)


def main() -> int:
    parser = build_parser()
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            raise OptionError(f"--device {args.device}: torch finds no CUDA device here; use --device cpu")
        device = torch.device(args.device)
        if args.repeats is None:
            args.repeats = 1 if device.type == "cpu" else 10
        if args.repeats < 1:
            raise OptionError(f"--repeats {args.repeats}: give at least 1")
        if device.type == "cuda":
            if device.index is not None:
                torch.cuda.set_device(device)
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.benchmark = True
        for rows in measure(args, device):  # large networks take minutes a method, and may be stopped
            text = table(rows, args, device)
            if args.markdown:
                write(text, args.markdown)
    except (OptionError, ValueError) as e:
        report(parser.prog, e)
        return 2
    print(text)
    return 0


def write(text: str, path: str) -> None:
    given = sys.argv[1:]
    at = given.index("--markdown")
    with open(path, "w", encoding="utf-8") as f:
        f.write(f"{text}\n\nPrinted by `python benchmarks/step_cost.py {shlex.join(given[:at] + given[at + 2:])}`\n")


if __name__ == "__main__":
    sys.exit(main())
