"""The routers of a PyTorch MoE model: where they are, and what their outputs mean.

Both are found by structure, never by architecture: transformers has some seventy MoE families, and
their modules agree in little more than that a block owns a router and its experts. Proven on the
families named in the tests.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from moesim.errors import RecordError

if TYPE_CHECKING:
    from torch import Tensor, nn

_NO_ROUTER = re.compile(r"shared_expert_gate|ForgetGate|ResidualGate|Gat(ed|ing)MLP")
_ROUTER = re.compile(r"TopK?Gating|TopK?k?Router|MoEGate|Top\dRouter")
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|block|h)\.(\d+)(?:\.|$)")
_BIAS = re.compile(r"correction_bias|expert_bias")

_SCATTERED = 0.3
"""Share of zeros from which a tensor over all experts holds the chosen ones' weights only."""

_LARGEST_HALF = 65504.0


class Choice(NamedTuple):
    """What a router chose for N tokens, on the model's device.

    ids, weights: (N, top_k), largest weight first. candidates: (N, M), the chosen experts and then
    the others, each by score; scores: (N, M) that by which the router selects.
    """

    ids: "Tensor"
    weights: "Tensor"
    candidates: "Tensor"
    scores: "Tensor"


class Router:
    """The router of one MoE layer.

    path: its block's name in the model. layer: the model's own number of the layer. module: the
    router. experts: the module that runs the experts, where it is one. width: experts per layer.
    """

    def __init__(self, path: str, module: "nn.Module", experts: "nn.Module | None") -> None:
        number = _LAYER.search(path)
        if number is None:
            raise RecordError(f"{path}: no layer number in the name of this MoE block")
        matrices = [p.shape[0] for p in module.parameters() if p.dim() == 2]
        if not matrices:
            raise RecordError(f"{path}: its router {type(module).__name__} has no weight matrix")
        self.path, self.layer, self.module, self.experts = path, int(number[1]), module, experts
        self.width = int(max(matrices))
        self.extra: list[Any] = []
        self._squash: str | None = None

    @property
    def name(self) -> str:
        """The block's name and the router's class, for messages."""
        return f"{self.path} ({type(self.module).__name__})"

    def apply(self, x: "Tensor", keep: int | None, top_k: int | None = None) -> Choice:
        """Return what this router would choose for inputs of any layer, firing no hooks.

        Further arguments are those of its last call in the model, which some families need.
        """
        return self.read(self.module.forward(x, *self.extra), keep, top_k)

    def read(self, output: Any, keep: int | None, top_k: int | None = None) -> Choice:
        """Return the choice that a router's output states, with `keep` candidates.

        None keeps 3 x top_k. Outputs are told apart by type and last dimension; `top_k` is needed
        where a router returns logits only. Raises RecordError if no choice is found.
        """
        import torch

        found = _sort_out(output, self.width, top_k or _stated_top_k(self.module))
        scores, weights, ids = (found.get(kind) for kind in ("scores", "weights", "ids"))
        if ids is None and "scattered" in found:
            chosen = found["scattered"]
            top_k = top_k or _stated_top_k(self.module) or int((chosen != 0).sum(-1).max())
            weights, ids = chosen.topk(top_k, dim=-1)
        if scores is None:
            scores = found.get("scattered")
        if scores is None:
            raise self._unread(output)
        scores = scores.float()
        if ids is None:
            top_k = top_k or _stated_top_k(self.module)
            if top_k is None:
                raise self._unread(output)
            ids = scores.topk(top_k, dim=-1).indices
        if weights is None:
            weights = scores.softmax(-1).gather(1, ids)
        if weights.shape != ids.shape or scores.shape[0] != ids.shape[0]:
            raise self._unread(output)
        ids, weights = in_rank_order(ids, weights.float())
        scores = self._selection(scores, ids, weights).clamp(-_LARGEST_HALF, _LARGEST_HALF)
        first = scores.gather(1, ids).argsort(dim=-1, descending=True, stable=True)
        chosen = ids.shape[1]
        further = min(3 * chosen if keep is None else keep, self.width) - chosen
        rest = scores.scatter(1, ids, -torch.inf).topk(max(further, 0), dim=-1).indices
        candidates = torch.cat([ids.gather(1, first), rest], dim=1)
        return Choice(ids, weights, candidates, scores.gather(1, candidates))

    def _selection(self, scores: "Tensor", ids: "Tensor", weights: "Tensor") -> "Tensor":
        """Return the scores by which experts are selected: with the correction bias, if any.

        DeepSeek-V3 and its kin add it to the sigmoid of the logits, ERNIE and LongCat to the
        softmax. The weights come from the same function, without bias; they tell which.
        """
        bias = self._bias()
        if bias is None:
            return scores
        options = {"sigmoid": scores.sigmoid(), "softmax": scores.softmax(-1)}
        if self._squash is None:
            shares = weights / weights.sum(-1, keepdim=True)
            misses = {}
            for name, squashed in options.items():
                chosen = squashed.gather(1, ids)
                expected = chosen / chosen.sum(-1, keepdim=True)
                misses[name] = float((expected - shares).abs().nanmean())
            self._squash = min(misses, key=lambda name: misses[name])
        return options[self._squash] + bias.float().flatten()

    def _bias(self) -> "Tensor | None":
        for value in self.extra:
            if hasattr(value, "shape") and value.numel() == self.width:
                return value
        named = [*self.module.named_buffers(), *self.module.named_parameters()]
        return next((value for name, value in named if _BIAS.search(name)), None)

    def _unread(self, output: Any) -> RecordError:
        parts = output if isinstance(output, (tuple, list)) else (output,)
        shapes = ", ".join(
            f"{str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}"
            if hasattr(part, "dtype")
            else type(part).__name__
            for part in parts
        )
        return RecordError(
            f"{self.name} returns {shapes}, in which no choice among {self.width} experts is found"
        )


def find_routers(model: "nn.Module") -> list[Router]:
    """Return the routers of a model, by layer.

    A MoE block is a module with a child `gate` or `router` beside a child `experts`, or whose
    router's class says so. Raises RecordError if there is none, or two of one layer.
    """
    routers = [Router(*found) for found in _blocks(model)]
    if not routers:
        raise RecordError(
            f"no MoE block in {type(model).__name__}: none of its modules has a child gate or "
            f"router beside a child experts"
        )
    for before, after in pairwise(routers):
        if after.layer <= before.layer:
            raise RecordError(
                f"{before.path} and {after.path} are layers {before.layer} and {after.layer}: a "
                f"trace has one router per layer, in ascending order, and no second stack"
            )
    widths = {router.width for router in routers}
    if len(widths) > 1:
        raise RecordError(f"layers have {sorted(widths)} experts; a trace has as many in each")
    return routers


def in_rank_order(ids: "Tensor", weights: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Return ids and weights (N, top_k) with the largest weight first."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order), weights.gather(1, order)


def executed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple["Tensor", "Tensor"] | None:
    """Return the ids and weights (N, top_k) that an experts module is called with, if it is."""
    tensors = [t.detach() for t in (*args, *kwargs.values()) if _is_matrix(t)]
    ids = next((t for t in tensors if not t.is_floating_point()), None)
    if ids is None:
        return None
    weights = next((t for t in tensors if t.is_floating_point() and t.shape == ids.shape), None)
    return None if weights is None else (ids.long(), weights.float())


def _blocks(model: "nn.Module") -> "Iterator[tuple[str, nn.Module, nn.Module | None]]":
    from torch import nn

    for path, module in model.named_modules():
        children = dict(module.named_children())
        router = next((children[name] for name in ("gate", "router") if name in children), None)
        if router is None or _NO_ROUTER.search(type(router).__name__):
            continue
        experts = children.get("experts")
        if experts is not None or _ROUTER.search(type(router).__name__):
            whole = not isinstance(experts, (nn.ModuleList, nn.ModuleDict))
            yield path, router, experts if whole else None


def _is_matrix(value: Any) -> bool:
    return hasattr(value, "is_floating_point") and value.dim() == 2


def _sort_out(output: Any, width: int, top_k: int | None) -> "dict[str, Tensor]":
    """Return the tensors of a router's output by what they mean, tokens flattened."""
    found: dict[str, Tensor] = {}
    parts = output if isinstance(output, (tuple, list)) else (output,)
    tensors = [t.detach().flatten(0, -2) for t in parts if hasattr(t, "dim") and t.dim() > 1]
    ids = next((t for t in tensors if not t.is_floating_point() and t.shape[1] <= width), None)
    if ids is not None:
        found["ids"], top_k = ids.long(), ids.shape[1]
    for t in tensors:
        if not t.is_floating_point():
            continue
        if t.shape[1] == width and not ("scores" in found and top_k == width):
            empty = ((t == 0) | t.isinf()).float().mean() > _SCATTERED
            found.setdefault("scattered" if empty else "scores", t)
        elif t.shape[1] == top_k:
            found.setdefault("weights", t)
    return found


def _stated_top_k(module: "nn.Module") -> int | None:
    for name in ("top_k", "moe_top_k", "k"):
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    return None
