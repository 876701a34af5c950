"""Products and sums of activations round as well: attention's, and what goes around a block before a norm.

They are calls of functions, not modules, so there is nothing to replace. Which of them a model makes is seen while it
runs: in which module, and the how manieth of its kind there. Their quantizers are modules of that one, so that they
are trained, moved and saved with the model, and no source text is patched.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from mlflow_tdeploy.build.fake_quant.layers import Replaced, quantizer
from mlflow_tdeploy.build.fake_quant.options import FakeQuant

_PRODUCTS = frozenset({torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.__matmul__})
_SUMS = frozenset({torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__iadd__, torch.Tensor.add_})
#: Where a module keeps the quantizers of the calls in it: ``MatMul_0_1`` is that of the first product's second operand.
_PLACE = "between_quantizers"


class Call(NamedTuple):
    """One place in a model where activations meet.

    Attributes:
        module: Name of the module that makes the call.
        kind: ``MatMul`` or ``Add``.
        number: Which of its kind, in one run of the module.
    """

    module: str
    kind: str
    number: int

    @property
    def name(self) -> str:
        """As rules and tables name it."""
        return f"{self.module}.{self.key}".lstrip(".")

    @property
    def key(self) -> str:
        """Its name within the module."""
        return f"{self.kind.lower()}_{self.number}"


@dataclass
class _Running:
    """A module that is being run.

    Attributes:
        name: Its name.
        took: The tensors that it was given, or has given to modules in it.
        counted: Calls so far, by kind.
    """

    name: str
    took: list[torch.Tensor]
    counted: Counter[str] = field(default_factory=Counter)


class _Calls(TorchFunctionMode):
    """Stands between a model and torch; what is done at a call is a subclass's."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._model = model
        self.running: list[_Running] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kind = "MatMul" if func in _PRODUCTS else "Add" if func in _SUMS else None
        if kind is None or not self.running or len(args) < 2 or not all(map(_is_activation, args[:2])):
            return func(*args, **kwargs)
        here = self.running[-1]
        call = Call(here.name, kind, here.counted[kind])
        here.counted[kind] += 1
        return self.called(call, here, args[:2], lambda two: func(*two, *args[2:], **kwargs))

    def called(self, call: Call, here: _Running, operands: Any, go_on: Callable[[Any], Any]) -> Any:
        """Do what is to be done at a call, and return its result."""
        raise NotImplementedError

    def entered(self, module: torch.nn.Module, tensors: Iterable[torch.Tensor]) -> None:
        """Be told of a module that is about to run."""

    @contextmanager
    def following(self) -> Iterator[None]:
        """Watch which module runs, for as long as the block takes."""
        with ExitStack() as stack:
            for name, module in self._model.named_modules():
                enter = functools.partial(self._enter, name)
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            # the model itself is not called but its forward, where this is part of it
            self.running.append(_Running("", []))
            stack.callback(self.running.clear)
            with self:
                yield

    def _enter(self, name: str, module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        tensors = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
        self.entered(module, tensors)
        self.running[-1].took.extend(tensors)  # held: the id of what is gone is used again
        self.running.append(_Running(name, tensors))

    def _leave(self, *_: Any) -> None:
        self.running.pop()


def _is_activation(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter) and value.is_floating_point()


class _Finder(_Calls):
    """Finds products between activations, and sums that a norm takes, with which of their operands are to round.

    Of a sum that is what goes around a block: what the module was given, or a block in it was, or such a sum itself.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.found: dict[Call, tuple[int, ...]] = {}
        self._sums: dict[int, tuple[Call, tuple[int, ...], Any]] = {}

    def called(self, call: Call, here: _Running, operands: Any, go_on: Callable[[Any], Any]) -> Any:
        result = go_on(operands)
        if call.kind == "MatMul":
            self.found[call] = (0, 1)
            return result
        around = tuple(index for index, one in enumerate(operands) if self._goes_around(one, here))
        if around:
            self._sums[id(result)] = (call, around, result)
        return result

    def _goes_around(self, tensor: torch.Tensor, here: _Running) -> bool:
        if id(tensor) in self._sums and self._sums[id(tensor)][0] in self.found:
            return True
        return any(one is tensor for one in here.took)

    def entered(self, module: torch.nn.Module, tensors: Iterable[torch.Tensor]) -> None:
        if "Norm" in type(module).__name__:
            known = (self._sums[id(one)] for one in tensors if id(one) in self._sums)
            self.found.update({call: operands for call, operands, _ in known})


class _Rounder(_Calls):
    """Rounds the operands of calls that have quantizers."""

    def called(self, call: Call, here: _Running, operands: Any, go_on: Callable[[Any], Any]) -> Any:
        place = getattr(self._model.get_submodule(call.module), _PLACE, None)
        if place is None:
            return go_on(operands)
        keys = [f"{call.key}_{index}" for index in range(2)]
        return go_on([place[key](one) if key in place else one for key, one in zip(keys, operands, strict=True)])


@dataclass(frozen=True)
class Between:
    """What was found between the layers of a model.

    Attributes:
        calls: Name → kind of all that could round.
        layers: What does.
    """

    calls: Mapping[str, str]
    layers: tuple[Replaced, ...]


def round_between(model: torch.nn.Module, options: FakeQuant, run: Callable[[], object]) -> Between:
    """Have a model round what its products and sums of activations take.

    Args:
        model: The model; it is changed.
        options: Which ones, and how.
        run: Runs it on something usual: what it calls then is found.
    """
    finder = _Finder(model)
    with torch.no_grad(), finder.following():
        run()
    done = []
    for call, operands in finder.found.items():
        rule = options.rule(call.name, call.kind)
        if rule is None or rule.input is None:
            continue
        owner = model.get_submodule(call.module)
        if not hasattr(owner, _PLACE):
            setattr(owner, _PLACE, torch.nn.ModuleDict())
        added = {f"{call.key}_{index}": quantizer(rule.input) for index in operands}
        getattr(owner, _PLACE).update(added)
        done.append(Replaced(call.name, call.kind, rule, tuple(added.values())))
    if done:
        _watch_itself(model)
    return Between({call.name: call.kind for call in finder.found}, tuple(done))


def _watch_itself(model: torch.nn.Module) -> None:
    """Have a model's forward round at the calls within, whoever calls it: a trainer, an exporter."""
    usual = type(model)

    @functools.wraps(usual.forward)  # trainers read its parameters
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Rounder(self).following():
            return usual.forward(self, *args, **kwargs)

    model.__class__ = type(usual.__name__, (usual,), {"forward": forward, "__module__": usual.__module__})
