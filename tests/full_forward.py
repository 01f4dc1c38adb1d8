"""What chaining and pruning are held against: whole forwards of a model, without any of the package's machinery."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lvlm_prune.blocks import BlockRunner, CaughtBatch, Decoder, find_decoder, prunable_linears
from lvlm_prune.methods.paired_statistics import CrossGram
from lvlm_prune.methods.patterns import Unstructured
from lvlm_prune.methods.solvers import LinearProblem, Solver


def own_forward(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[dict[int, Tensor], Tensor]:
    """(block to its input, the decoder's last hidden state) of the model's own forward."""
    decoder: Decoder = find_decoder(model)
    block_inputs: dict[int, Tensor] = {}
    last: list[Tensor] = []

    def note_input(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple, keywords: dict) -> None:
            name = list(inspect.signature(type(module).forward).parameters)[1]
            block_inputs[index] = (arguments[0] if arguments else keywords[name]).clone()

        return hook

    def note_output(module: nn.Module, _: tuple, output: Any) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        last.append((output[0] if hidden is None else hidden).clone())

    handles = [
        layer.register_forward_pre_hook(note_input(index), with_kwargs=True)
        for index, layer in enumerate(decoder.layers)
    ]
    handles.append(decoder.module.register_forward_hook(note_output))
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return block_inputs, last[0]


def halve(block: nn.Module) -> None:
    """Set the smaller half of every row of every matrix to zero, experts and routers included."""
    for parameter in block.parameters():
        if parameter.ndim >= 2:
            rows = parameter.data.view(-1, parameter.shape[-1])
            smallest = rows.abs().argsort(dim=1, stable=True)[:, : rows.shape[1] // 2]
            rows.scatter_(1, smallest, 0)


class _ExpertProducts(TorchFunctionMode):
    """Sums up the squares of what each matrix of a stack of experts is multiplied with, seen at the product itself."""

    def __init__(self, stacks: dict[str, Tensor]) -> None:
        super().__init__()
        self.stacks = stacks
        self.norms: dict[str, dict[int, Tensor]] = {name: {} for name in stacks}

    def __torch_function__(self, function: Any, types: Any, arguments: tuple = (), keywords: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("linear", "matmul", "__matmul__", "bmm"):
            tokens, weight = arguments[:2]
            for name, stack in self.stacks.items():
                first, matrix = (weight.data_ptr() - stack.data_ptr()) // stack[0].nbytes, weight.ndim == 2
                if 0 <= first < len(stack):
                    for index, own in enumerate([tokens] if matrix else tokens, first):
                        squares = own.reshape(-1, own.shape[-1]).double().square().sum(0)
                        self.norms[name][index] = self.norms[name].get(index, 0) + squares
        return function(*arguments, **(keywords or {}))


def prune_on_the_way(runner: BlockRunner, batches: list[CaughtBatch]) -> None:
    """Run all blocks one after the other, each halved before its outputs become the next one's inputs."""
    for index in range(len(runner)):
        for batch in batches:
            runner.run(index, batch)
        halve(runner.block(index))
        for batch in batches:
            runner.advance(index, batch)


def compute_experts_one_by_one(model: nn.Module) -> nn.Module:
    """Let a model compute its routed experts in a loop, as its family wrote it down."""
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_experts_implementation", None):
            module.config._experts_implementation = "eager"
    return model


@torch.no_grad()
def prune_by_full_forwards(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    experts: bool = False,
    calibrate_on: str = "pruned",
    sequential: bool = False,
) -> dict[str, Tensor]:
    """Wanda at 50%: a whole forward of the model for each block and sample.

    Args:
        model: The model; with `experts` one that computes them one by one.
        batches: The samples.
        experts: Prune the matrices of routed experts too.
        calibrate_on: `dense`: every block is as it was again before the next one is looked at.
        sequential: Prune the first site that is open, and run the model again; experts come last.

    Returns:
        Full name of each Linear that was called -> where its weight is zero afterwards; of each expert matrix likewise,
        under the name `experts.7.down_proj`.
    """
    decoder, masks = find_decoder(model), dict[str, Tensor]()
    for path, block in zip(decoder.names, decoder.layers):
        before = {name: value.clone() for name, value in block.state_dict().items()}
        linears = {
            name: linear
            for name, linear in prunable_linears(block).items()
            if experts or "experts" not in name.split(".")
        }
        stacks = {
            name: parameter.data
            for name, parameter in block.named_parameters()
            if experts and parameter.ndim == 3 and ".shared" not in name and "conv" not in name
        }
        while found := _prune_once(model, batches, path, block, linears, stacks, sequential):
            masks |= found
            linears = {name: linear for name, linear in linears.items() if f"{path}.{name}" not in masks}
            leaves = {name.rpartition(".")[2] for name in found if ".experts." in name}
            stacks = {name: stack for name, stack in stacks.items() if name.rpartition(".")[2] not in leaves}
            if not sequential:
                break
        if calibrate_on == "dense":
            block.load_state_dict(before)
    return masks


def _prune_once(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    path: str,
    block: nn.Module,
    linears: dict[str, nn.Linear],
    stacks: dict[str, Tensor],
    first_only: bool,
) -> dict[str, Tensor]:
    """Masks of all Linears and experts of a block, or of the first site among them, from a forward of each sample."""
    norms: dict[str, Tensor] = {}
    fed: dict[str, Tensor] = {}
    hooks = [linear.register_forward_pre_hook(_add_to(norms, name, fed)) for name, linear in linears.items()]
    with _ExpertProducts(stacks) as products:
        for batch in batches:
            model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    called = list(norms)
    if first_only:
        called = [name for name in called if fed[name].data_ptr() == fed[called[0]].data_ptr()]
        leaves = [name for name in stacks if not called and name.endswith(("up_proj", "down_proj"))]
        leaf = max((name.rpartition(".")[2] for name in leaves), default="")  # `up` and `gate_up` before `down`
    masks = {}
    for name, norms_of in products.norms.items():
        if first_only and not (leaves and name.rpartition(".")[2] == leaf):
            continue
        parent, _, last = name.rpartition(".")
        for index, squares in norms_of.items():
            matrix = stacks[name][index]
            if matrix.shape[1] != len(squares) or _is_transposed(block.get_submodule(parent)):
                matrix = matrix.T
            lowest = (matrix.abs().double() * squares.sqrt()).argsort(dim=1, stable=True)
            matrix.scatter_(1, lowest[:, : matrix.shape[1] // 2], 0.0)
            masks[f"{path}.{parent}.{index}.{last}"] = matrix == 0
    for name in called:
        linear = linears[name]
        score = linear.weight.abs().double() * norms[name].sqrt()
        lowest = score.argsort(dim=1, stable=True)[:, : score.shape[1] // 2]
        linear.weight.data.scatter_(1, lowest, 0.0)
        masks[f"{path}.{name}"] = linear.weight == 0
    return masks


@torch.no_grad()
def solve_by_full_forwards(
    model: nn.Module, dense: nn.Module, batches: list[dict[str, Tensor]], solver: Solver, sequential: bool
) -> dict[str, Tensor]:
    """Half of each Linear, from whole forwards of the model and of the dense one.

    Args:
        model: The model.
        dense: The same model, which stays as it is.
        batches: The samples, without padding.
        solver: Asks for `CrossGram`.
        sequential: Solve the first site that is open, and run the model again; else all sites of a block at once.

    Returns:
        Full name -> weight of each Linear in the order in which they were solved.
    """
    decoder, solved = find_decoder(model), dict[str, Tensor]()
    for index, path in enumerate(decoder.names):
        block, twin = decoder.layers[index], find_decoder(dense).layers[index]
        linears = {name: one for name, one in prunable_linears(block).items() if "experts" not in name.split(".")}
        while open_linears := {name: one for name, one in linears.items() if f"{path}.{name}" not in solved}:
            sums: dict[str, CrossGram] = {}
            site: list[str] = []
            for batch in batches:
                own, other = (
                    _inputs_of(one, module, open_linears, batch) for one, module in ((model, block), (dense, twin))
                )
                for name, calls in own.items():
                    sums.setdefault(name, CrossGram(calls[0].shape[-1]))
                    for inputs, dense_inputs in zip(calls, other[name], strict=True):
                        sums[name].add(inputs, torch.ones(len(inputs)), dense=dense_inputs)
                if own and not site:
                    first = next(iter(own.values()))[0]
                    site = [name for name, calls in own.items() if calls[0].data_ptr() == first.data_ptr()]
            if not sums:  # what is left is called by no sample
                break
            for name in site if sequential else list(sums):
                weight = linears[name].weight
                solution = solver.solve(LinearProblem(weight.data.clone(), sums[name], 0.5, Unstructured()))
                weight.data.copy_(solution.weight)
                solved[f"{path}.{name}"] = solution.weight
    return solved


def _inputs_of(
    model: nn.Module, block: nn.Module, linears: Mapping[str, nn.Module], batch: dict[str, Tensor]
) -> dict[str, list[Tensor]]:
    """What the Linears of a block are fed in a whole forward, in the order of their calls.

    For each call of one a tensor of shape (tokens, channels).
    """
    found: dict[str, list[Tensor]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            found.setdefault(name, []).append(arguments[0].flatten(0, -2))

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(note(name)) for name in linears]
    model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def zeros(model: nn.Module, name: str) -> Tensor:
    """Where a Linear, or a matrix of an expert, is zero."""
    parent, _, leaf = name.rpartition(".")
    if (index := parent.rpartition(".")[2]).isdigit() and ".experts." in name:
        module = model.get_submodule(parent.rpartition(".")[0])
        matrix = getattr(module, leaf)[int(index)]
        return (matrix.T if _is_transposed(module) else matrix) == 0
    return model.get_submodule(name).weight == 0


def tensors_of(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Samples as `TensorSource` reads them."""
    return {f"s{number}.{name}": value for number, sample in enumerate(samples) for name, value in sample.items()}


def _is_transposed(experts: nn.Module) -> bool:
    return type(experts).__name__ in ("AriaExperts", "Llama4TextExperts")


def _add_to(norms: dict[str, Tensor], name: str, fed: dict[str, Tensor] | None = None) -> Callable[..., None]:
    """Adds the squares of what a Linear is fed; `fed` keeps that of the last sample."""

    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if fed is not None:
            fed[name] = arguments[0]
        tokens = arguments[0].reshape(-1, arguments[0].shape[-1]).double()
        norms[name] = norms.get(name, 0) + tokens.square().sum(0)

    return hook


@torch.no_grad()
def prune_towers_by_full_forwards(
    model: nn.Module, towers: list[str], batches: list[dict[str, Tensor]], sparsity: float
) -> dict[str, Tensor]:
    """Wanda of vision blocks, each from a whole forward of the model for each sample.

    Args:
        model: The model.
        towers: Paths of the lists of blocks, in the order in which they run.
        batches: The samples.
        sparsity: Share of each row that goes.

    Returns:
        As `prune_by_full_forwards`.
    """
    masks = {}
    for path in [f"{tower}.{index}" for tower in towers for index in range(len(model.get_submodule(tower)))]:
        norms: dict[str, Tensor] = {}
        linears = {
            name: module for name, module in model.get_submodule(path).named_modules() if isinstance(module, nn.Linear)
        }
        hooks = [linear.register_forward_pre_hook(_add_to(norms, name)) for name, linear in linears.items()]
        for batch in batches:
            model(**batch, use_cache=False)
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            score = linear.weight.abs().double() * norms[name].sqrt()
            lowest = score.argsort(dim=1, stable=True)[:, : int(score.shape[1] * sparsity)]
            linear.weight.data.scatter_(1, lowest, 0.0)
            masks[f"{path}.{name}"] = linear.weight == 0
    return masks
