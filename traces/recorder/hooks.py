"""Hooks that record a MoE model's routing, and what cheap predictors would have guessed.

In every MoE layer the router's input, its output and the arguments of the experts are looked at and
left alone: outputs stay what they were, to the bit. A guess for a layer is what that layer's router
makes of the router input of an earlier layer (Fate; Mixtral-offloading). All it needs is known in
the earlier layer; the hook of the guessed one computes it, when that router's own arguments are
known, too.
"""

import contextlib
import importlib.metadata
import inspect
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moesim.errors import ModelError, RecordError
from moesim.model import ModelSpec, spec_from_config, spec_to_dict
from moesim.traces.format import MISSING, AnyArray, Trace, read_trace, write_trace
from moesim.traces.recorder.batches import Batches, Rows
from moesim.traces.recorder.routers import Router, executed, find_routers, in_rank_order
from moesim.traces.recorder.spool import Spool

if TYPE_CHECKING:
    from torch import Tensor, nn

MeanInputs = npt.NDArray[np.float32]

_CANDIDATES, _SCORES = "candidates_", "candidate_scores_"


@contextlib.contextmanager
def record(
    model: "nn.Module", path: str | os.PathLike[str] | None = None, **options: Any
) -> "Iterator[Recorder]":
    """Record the routing of every forward pass of a model, and leave no hook behind.

        with record(model, "trace.npz") as recorder:
            model.generate(**inputs, max_new_tokens=64)

    The trace is written to `path` at the end, also when an exception such as KeyboardInterrupt ends
    the block; `recorder.trace()` returns it. Options are those of `Recorder`. What is recorded is
    greedy or sampled generation with a cache, and plain forward passes, which are prefill; no
    beams and no speculation.

    Raises RecordError for a model whose routers are not found or not understood, and for a pass
    that does not go on where the one before ended.
    """
    beside = None if path is None else Path(path).absolute().parent
    with (
        tempfile.TemporaryDirectory(prefix=".moesim-", dir=beside) as scratch,
        Spool(Path(scratch) / "spool", {}) as spool,
    ):
        recorder = Recorder(model, spool, **options)
        try:
            with recorder.hooked():
                yield recorder
        except RecordError:
            raise
        except BaseException:
            if spool.rows:
                recorder.finish(path)
            raise
        recorder.finish(path)


class Recorder:
    """Turns what the hooks see into rows of a trace, appended to a spool.

    ahead: guesses are made so many layers ahead and fewer: `gate1`, `gate2`, ... And `wrap1`, for
    the first layer only, and not in prompts: its router on the previous token's input of the last
    layer's router (MoEPic). residuals: mean router inputs (layers, hidden) of other text, which are
    the `mean_inputs` of an earlier recording; they add `residual1`, `residual2`, ...: the gate on
    an input to which is added what inputs grow by on average until the guessed layer (DALI). width:
    candidates kept of each guess, and of the router's own choice; 3 x top_k unless given.

    guess_scores: keep the scores of guesses, too; those of the router always are. token_ids: keep
    what was read, -1 where that were embeddings. first_sequence: number of the first sequence.
    on_rows: called with the number of rows after every forward pass. meta: added to what the trace
    says.

    What ends a sequence while others of its batch go on, and where prompts end, is known from calls
    of the model's own `generate`, and only there.

    Raises RecordError if the model has no routers, is in training mode, or is not what its config
    says.
    """

    def __init__(
        self,
        model: "nn.Module",
        spool: Spool,
        *,
        ahead: int = 3,
        width: int | None = None,
        residuals: MeanInputs | None = None,
        guess_scores: bool = False,
        token_ids: bool = True,
        first_sequence: int = 0,
        on_rows: Callable[[int], None] | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.spool = model, spool
        self.architecture = type(model).__name__
        if model.training:
            raise RecordError(f"{self.architecture} is in training mode; call model.eval() first")
        self.routers = find_routers(model)
        self.spec = spec_of(model, self.routers)
        layers = len(self.routers)
        if residuals is not None and (residuals.ndim != 2 or len(residuals) != layers):
            raise RecordError(
                f"residuals have shape {residuals.shape}; those of this model have ({layers}, "
                f"hidden)"
            )
        if ahead < 0 or (width is not None and width < 1):
            raise RecordError(f"ahead {ahead} and width {width}: legal are 0 or more, 1 or more")
        distances = range(1, min(ahead, layers - 1) + 1)
        self._gates = {f"gate{d}": d for d in distances}
        self._corrected = {f"residual{d}": d for d in distances if residuals is not None}
        self.predictors = [*self._gates, *self._corrected, *(["wrap1"] if ahead else [])]
        self._residuals = residuals
        self._width, self._guess_scores, self._token_ids = width, guess_scores, token_ids
        self._batches = Batches(first_sequence)
        self._on_rows, self._meta = on_rows, meta or {}
        self._signature = inspect.signature(model.forward)
        self._pass: _Pass | None = None
        self._tail: Tensor | None = None
        self._shape: tuple[int, int] | None = None
        self._input_sums: npt.NDArray[np.float64] | None = None
        self._input_tokens = 0
        self._trace: Callable[[], Trace] | None = None

    @property
    def sequences(self) -> int:
        """How many sequences there were, earlier recordings of the same trace included."""
        return self._batches.sequences

    @property
    def mean_inputs(self) -> MeanInputs:
        """The mean router input of all tokens so far (layers, hidden).

        Raises RecordError if there were none.
        """
        if self._input_sums is None:
            raise self._nothing()
        return (self._input_sums / self._input_tokens).astype(np.float32)

    def trace(self) -> Trace:
        """Return the trace, when the recording is over. Raises RecordError if it is empty."""
        if self._trace is None:
            raise self._nothing()
        return self._trace()

    def finish(self, path: str | os.PathLike[str] | None) -> None:
        """Make the trace of all rows, as a file if a path is given.

        Raises RecordError if there are none.
        """
        if not self.spool.rows:
            raise self._nothing()
        if path is None:
            trace = self._assembled({n: np.array(a) for n, a in self.spool.arrays().items()})
            self._trace = lambda: trace
        else:
            write_trace(self._assembled(self.spool.arrays()), path)
            self._trace = partial(read_trace, path)

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Hold the hooks on the model, and on nothing afterwards."""
        handles = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end),
        ]
        for i, router in enumerate(self.routers):
            routed = partial(self._routed, i)
            handles.append(router.module.register_forward_hook(routed, with_kwargs=True))
            if router.experts is not None:
                ran = partial(self._ran, i)
                handles.append(router.experts.register_forward_pre_hook(ran, with_kwargs=True))
        if hasattr(self.model, "generate"):
            self.model.generate = partial(self._generate, self.model.generate)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.model.__dict__.pop("generate", None)
            self._pass = self._tail = None

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Generate as the model does, and let the batches know what only this call says."""
        batches = self._batches
        configs = (kwargs, kwargs.get("generation_config"), self.model.generation_config)

        def stated(name: str) -> Any:
            values = (
                c.get(name) if isinstance(c, dict) else getattr(c, name, None) for c in configs
            )
            return next((value for value in values if value is not None), None)

        inputs = [*args[:1], *(kwargs.get(n) for n in ("inputs", "input_ids", "inputs_embeds"))]
        prompt = next((value for value in inputs if value is not None), None)
        together = 1 if prompt is None else len(prompt)
        refused = {
            "beams": (stated("num_beams") or 1) > 1,
            "speculation": bool(stated("assistant_model") or stated("prompt_lookup_num_tokens")),
            "use_cache=False": stated("use_cache") is False,
            "stopping criteria for more than one sequence at once": together > 1
            and bool(stated("stopping_criteria") or stated("stop_strings")),
        }
        for what, asked in refused.items():
            if asked:
                raise self._error(f"generating with {what} cannot be recorded")
        stop = stated("eos_token_id")
        batches.stop_ids = [] if stop is None else np.ravel(stop).tolist()
        batches.prompt_columns = None if prompt is None else int(prompt.shape[1])
        try:
            return generate(*args, **kwargs)
        finally:
            batches.stop_ids, batches.prompt_columns = (), None

    # Hooks return None: anything else would replace what a module takes or gives. A router that
    # is called outside of a pass of the model is none of ours.

    def _begin(self, module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        rows = self._batches.follow({**given, **given.get("kwargs", {})})
        self._pass = _Pass(rows)
        if rows.starts or rows.columns > 1:
            self._tail = None

    def _routed(
        self, i: int, module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        import torch

        now, router = self._pass, self.routers[i]
        if now is None:
            return
        if i in now.chosen:
            raise self._error(f"{router.name} was called twice in one forward pass")
        top_k = None if self.spec is None else self.spec.top_k
        with torch.no_grad():
            x, *router.extra = *args, *kwargs.values()
            x = x.detach().clone()  # some families go on to add to it in place
            choice = router.read(out, self._width, top_k)
            now.chosen[i] = choice.ids, choice.weights
            now.put("router", i, choice.candidates, choice.scores)
            try:
                again = router.apply(x, 0, top_k) if now.rows.starts else choice
                for name, source in self._sources(i, now, x).items():
                    guess = router.apply(source, self._width, top_k)
                    now.put(name, i, guess.candidates, guess.scores if self._guess_scores else None)
            except (RuntimeError, ValueError, TypeError, IndexError) as error:
                raise self._error(f"{router.name} cannot be asked again: {error}") from error
            self._compare(i, "its own recorded input makes it choose", again.ids)
            now.inputs[i] = x
            now.inputs.pop(i - max(len(self._gates), 1), None)
            now.sums[i] = now.own(x.flatten(0, -2)).sum(0, dtype=torch.float32)

    def _sources(self, i: int, now: "_Pass", x: "Tensor") -> "dict[str, Tensor]":
        """Return the router inputs of earlier layers, by the predictor that guesses from them."""
        import torch

        found = {n: now.inputs[i - d].to(x.device) for n, d in self._gates.items() if d <= i}
        if self._residuals is not None and self._residuals.shape[1] != x.shape[-1]:
            raise self._error(
                f"residuals are {self._residuals.shape[1]} wide; the routers' inputs are "
                f"{x.shape[-1]}"
            )
        for name, distance in self._corrected.items():
            if self._residuals is not None and distance <= i:
                growth = torch.from_numpy(self._residuals[i] - self._residuals[i - distance])
                found[name] = found[f"gate{distance}"] + growth.to(x.device, x.dtype)
        if i == 0 and self._tail is not None and "wrap1" in self.predictors:
            found["wrap1"] = self._tail.to(x.device)
        return found

    def _ran(
        self, i: int, module: "nn.Module", args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        now, ran = self._pass, executed(args, kwargs)
        if now is not None and ran is not None and i in now.chosen:
            self._compare(i, "its experts are given", ran[0])
            now.chosen[i] = in_rank_order(*ran)

    def _end(self, module: "nn.Module", args: tuple[Any, ...], out: Any) -> None:
        now, self._pass = self._pass, None
        if now is None:
            return
        missed = [router for i, router in enumerate(self.routers) if i not in now.chosen]
        if missed:
            raise self._error(
                f"{len(missed)} of {len(self.routers)} routers were not called in a forward pass, "
                f"{missed[0].name} first"
            )
        last = now.inputs[len(self.routers) - 1]
        starts = np.arange(len(now.rows.last)) * now.rows.columns
        tail = last.flatten(0, -2)[_indices(starts + now.rows.last, last)]
        self._tail = tail[:, None] if last.dim() > 2 else tail  # as routers are used to it
        sums = np.stack([now.sums[i].cpu().numpy() for i in range(len(self.routers))])
        self._input_sums = sums + (0.0 if self._input_sums is None else self._input_sums)
        self._input_tokens += len(now.rows.flat)
        self.spool.append(self._rows_of(now))
        if self._on_rows is not None:
            self._on_rows(self.spool.rows)

    def _rows_of(self, now: "_Pass") -> dict[str, AnyArray]:
        rows, layers, experts = now.rows, len(self.routers), self.routers[0].width
        if self._shape is None:
            top_k = max(ids.shape[1] for ids, _ in now.chosen.values())
            self._shape = top_k, min(self._width or 3 * top_k, experts)
        top_k, width = self._shape

        def stacked(parts: "dict[int, Tensor]", wide: int, fill: int, dtype: Any) -> AnyArray:
            array = np.full((len(rows.flat), layers, wide), fill, dtype)
            for i, part in parts.items():
                array[:, i, : part.shape[1]] = part.cpu().numpy()[:, :wide]
            return array

        ids = {i: now.own(ids) for i, (ids, _) in now.chosen.items()}
        weights = {i: now.own(weights) for i, (_, weights) in now.chosen.items()}
        arrays = {
            "experts": stacked(ids, top_k, MISSING, np.uint16),
            "weights": stacked(weights, top_k, 0, np.float16),
            "sequence": rows.sequence,
            "position": rows.position,
            "phase": rows.phase,
        }
        if self._token_ids:
            arrays["token_id"] = rows.token_id
        for name in ["router", *self.predictors]:
            arrays[_CANDIDATES + name] = stacked(now.ids[name], width, MISSING, np.uint16)
            if name == "router" or self._guess_scores:
                arrays[_SCORES + name] = stacked(now.scores[name], width, 0, np.float16)
        if not (np.isfinite(arrays["weights"]).all() and (arrays["weights"] >= 0).all()):
            raise self._error("a router's weights are negative or not finite")
        return arrays

    def _assembled(self, arrays: dict[str, AnyArray]) -> Trace:
        def named(prefix: str) -> dict[str, AnyArray]:
            return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}

        return Trace(
            **{n: a for n, a in arrays.items() if not n.startswith("candidate")},
            layer_ids=np.array([router.layer for router in self.routers], np.int32),
            candidates=named(_CANDIDATES),
            candidate_scores=named(_SCORES),
            meta={**self._about(), **self._meta},
        )

    def _about(self) -> dict[str, Any]:
        versions = [f"{name} {importlib.metadata.version(name)}" for name in _ENGINE]
        about: dict[str, Any] = {
            "model": _name_of(self.model),
            "architecture": self.architecture,
            "num_experts": self.routers[0].width,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "engine": ", ".join(versions),
            "importer": "recorder",
            "granularity": "token",
            "id_space": "logical",
            "has_rank_order": True,
        }
        return about if self.spec is None else {**about, "spec": spec_to_dict(self.spec)}

    def _compare(self, i: int, what: str, ids: "Tensor") -> None:
        """Raise RecordError unless router i chose these experts, in any order."""
        import torch

        now, router = self._pass, self.routers[i]
        assert now is not None
        chosen = now.own(now.chosen[i][0]).sort(-1).values
        others = now.own(ids).to(chosen.device).sort(-1).values
        if chosen.shape == others.shape and torch.equal(chosen, others):
            return
        raise self._error(
            f"{router.name}: {what} other experts than it was seen to choose; this architecture "
            f"is not understood"
        )

    def _error(self, message: str) -> RecordError:
        return RecordError(f"{self.architecture}: {message}")

    def _nothing(self) -> RecordError:
        return self._error(
            "nothing was recorded; call the model that was given to record(), without "
            "torch.compile and CUDA graphs, which bypass hooks"
        )


class _Pass:
    """What the hooks have seen in one forward pass."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.chosen: dict[int, tuple[Tensor, Tensor]] = {}
        self.inputs: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}
        self.ids: defaultdict[str, dict[int, Tensor]] = defaultdict(dict)
        self.scores: defaultdict[str, dict[int, Tensor]] = defaultdict(dict)

    def own(self, tensor: "Tensor") -> "Tensor":
        """Return the rows that are no padding."""
        return tensor[_indices(self.rows.flat, tensor)]

    def put(self, name: str, i: int, ids: "Tensor", scores: "Tensor | None") -> None:
        """Keep a guess for layer i, small."""
        import torch

        self.ids[name][i] = self.own(ids).to(torch.int32)
        if scores is not None:
            self.scores[name][i] = self.own(scores).half()


_ENGINE = ("transformers", "torch")


def _indices(rows: Any, tensor: "Tensor") -> "Tensor":
    import torch

    return torch.from_numpy(np.asarray(rows, np.int64)).to(tensor.device)


def spec_of(model: "nn.Module", routers: list[Router]) -> ModelSpec | None:
    """Return what the model's config says it is, None where that is not enough.

    Raises RecordError where it says something else than the modules.
    """
    config = getattr(model, "config", None)
    try:
        spec = spec_from_config(None if config is None else config.to_dict(), _name_of(model))
    except (ModelError, AttributeError):
        return None
    layers = tuple(router.layer for router in routers)
    experts = spec.experts + spec.weightless_experts
    if layers != spec.layer_ids or routers[0].width != experts:
        raise RecordError(
            f"{type(model).__name__}: its config says {experts} experts in layers "
            f"{list(spec.layer_ids)}; routers of {routers[0].width} were found in {list(layers)}"
        )
    return spec


def _name_of(model: "nn.Module") -> str:
    source = str(getattr(getattr(model, "config", None), "name_or_path", ""))
    return Path(source).resolve().name if source else type(model).__name__
