"""Experts of a mixture in the layout of another checkpoint: which slices of which stored tensors a tensor of it is.

A layout is a row of facts: where the matrix [out, in] of one projection of one expert lies. Touches no tensor data.
Source: transformers 5's conversion_mapping.py, modeling_mixtral.py, modeling_qwen3_moe.py and modeling_gpt_oss.py.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace

from rvdist.core.errors import BadInput
from rvdist.weights.checkpoint.difference import Difference, Form, LowRank, Rows, is_adapter
from rvdist.weights.checkpoint.directory import Checkpoint
from rvdist.weights.checkpoint.experts import FUSED, GRANITE, INTERLEAVED, ONE_BY_ONE, beside_experts, in_memory
from rvdist.weights.checkpoint.fp8 import MXFP4, Scaled
from rvdist.weights.checkpoint.header import ITEMSIZE, TensorSpec
from rvdist.weights.checkpoint.tied import without_copied_head

GATE, UP, DOWN = "gate", "up", "down"
_PROJ = {GATE: "gate_proj", UP: "up_proj", DOWN: "down_proj"}
_W = {GATE: "w1", UP: "w3", DOWN: "w2"}
_SINGLE = re.compile(r"((?:.+\.)?experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.(weight|bias)")
_FUSED = re.compile(r"((?:.+\.)?experts)\.(gate_up_proj|down_proj)(_bias)?")
_IN_BY_OUT = (
    "gpt_oss",
    "aria",
    "openai_privacy_filter",
)  # models of transformers with experts [in, out], is_transposed
_GRANITE = {"gate_up_proj": "input_linear", "down_proj": "output_linear"}
_MOST_EXPERTS = 1 << 16  # of a layer


@dataclass(frozen=True)
class Group:
    """The experts under one prefix: their layout, what projections are called where that differs, how many experts
    there are, and the columns of a `hidden` and of an `intermediate` vector. `biased`: whether they have biases."""

    prefix: str
    layout: str
    called: tuple[tuple[str, str], ...]
    count: int
    hidden: int
    intermediate: int
    biased: bool

    @property
    def key(self) -> str:
        """The prefix as Mixtral has it in memory; Granite-MoE has its experts without one of their own."""
        return in_memory(self.prefix if self.prefix.endswith("experts") else f"{self.prefix}.experts")

    @property
    def size(self) -> tuple[int, int, int]:
        """What two groups must share so that one is a permutation of the other, but for biases."""
        return self.count, self.hidden, self.intermediate

    def holder(self, projection: str, expert: int, part: str) -> str:
        """The tensor that holds a part, `weight` or `bias`, of a projection of an expert."""
        if self.layout == ONE_BY_ONE:
            return f"{self.prefix}.{expert}.{dict(self.called)[projection]}.{part}"
        name = "down_proj" if projection == DOWN else "gate_up_proj"
        if self.called:
            return f"{self.prefix}.{dict(self.called)[name]}.weight"
        return f"{self.prefix}.{name}{'_bias' if part == 'bias' else ''}"

    def shape(self, projection: str) -> tuple[int, int]:
        """Rows, which are outputs, and columns of a projection's matrix."""
        return (self.hidden, self.intermediate) if projection == DOWN else (self.intermediate, self.hidden)

    def elements(self, projection: str, expert: int, part: str) -> range:
        """Those of the tensor that holds a part which have it: of gate and up that alternate, those of both."""
        rows, columns = self.shape(projection)
        size = rows * columns if part == "weight" else rows
        if self.layout == ONE_BY_ONE:
            return range(size)
        if projection == DOWN:
            return range(expert * size, (expert + 1) * size)
        if self.layout == INTERLEAVED:
            return range(2 * expert * size, 2 * (expert + 1) * size)
        first = (2 * expert + (projection == UP)) * size
        return range(first, first + size)


@dataclass(frozen=True)
class View:
    """A tensor in another layout: of each of its experts, from `first` on, these projections' part, put together as in
    `layout`, out of the tensors of `source`."""

    source: Group
    layout: str
    projections: tuple[str, ...]
    part: str
    first: int
    count: int

    @property
    def joined(self) -> bool:
        """Whether it is made of whole matrices and vectors, one after the other; else they lie transposed or in turn
        in one of the two layouts."""
        return INTERLEAVED not in (self.layout, self.source.layout)

    def ranges(self) -> dict[str, set[range]]:
        """The elements of the source's tensors that it is made of, by the tensor's name."""
        found: dict[str, set[range]] = {}
        for expert in range(self.first, self.first + self.count):
            for projection in self.projections:
                holder = self.source.holder(projection, expert, self.part)
                found.setdefault(holder, set()).add(self.source.elements(projection, expert, self.part))
        return found


@dataclass(frozen=True)
class Relaid(Checkpoint):
    """A checkpoint whose `tensors` have the names and shapes of another layout. `views` has those that are made of
    `inner`'s; `names` what the others are called there; `layout` says all that decides which it is."""

    inner: Checkpoint | None = None
    layout: str = ""
    views: dict[str, View] = field(default_factory=dict, repr=False)
    names: dict[str, str] = field(default_factory=dict, repr=False)

    def reads(self, name: str) -> Iterator[tuple[TensorSpec, int]]:
        """What stands in files of tensor `name`, and the bytes of each that are read."""
        if name not in self.views:
            yield from self._stored(self.names[name])
            return
        for holder, ranges in self.views[name].ranges().items():
            yield from self._stored(holder, sum(map(len, ranges)))

    def _stored(self, name: str, count: int | None = None) -> Iterator[tuple[TensorSpec, int]]:
        """The same of so many elements of one of `inner`'s tensors, or of all."""
        assert self.inner is not None
        spec = self.inner.tensors[name]
        count = spec.numel if count is None else count
        if not isinstance(self.inner, Scaled) or name not in self.inner.scales:
            yield spec, count * ITEMSIZE[spec.dtype]
            return
        kind, scale = self.inner.kind, self.inner.scales[name]
        yield self.inner.codes(name), count * kind.bits // 8
        yield scale, scale.nbytes * count // spec.numel if kind is MXFP4 else scale.nbytes


@dataclass(frozen=True)
class RelaidDifference(Relaid, Difference):
    """A stored vector or an adapter of which so much is true; its `forms` are by the names that it stores."""


def form_of(difference: Difference, name: str) -> Form | None:
    """What a difference stores of a tensor that it reads; None where that is made of others."""
    stored = difference.names.get(name, "") if isinstance(difference, RelaidDifference) else name
    return difference.forms.get(stored)


def lay_out(donor: Checkpoint, base: Checkpoint) -> Checkpoint:
    """`donor` with its experts in the layout of `base`; itself where they are, or where `base` has none like them. A
    difference needs none of the biases that `base` has, and an adapter's own experts lie as those of `base`. Raises
    BadInput for dtypes that one tensor cannot have."""
    target = groups(base)
    if isinstance(donor, Difference):
        donor = without_copied_head(turn(donor, base), base)
    own = _parts_of_groups(donor, target) | groups(donor)
    layout: list[tuple[str, ...]] = []
    views: dict[str, View] = {}
    specs: dict[str, TensorSpec] = {}
    gone: set[str] = set()
    for key, source in own.items():
        wanted = target.get(key)
        if wanted is None or wanted.size != source.size or _alike(wanted, source):
            continue
        if wanted.biased != source.biased and (source.biased or not isinstance(donor, Difference)):
            continue
        layout.append((wanted.prefix, wanted.layout, *dict(wanted.called).values()))
        for name, view in _views(wanted, source):
            holders = view.ranges().keys()
            if not holders & donor.tensors.keys():  # an adapter may have some
                continue
            held = [donor.tensors[holder] for holder in sorted(holders)]
            if len({spec.dtype for spec in held}) > 1:
                raise BadInput(
                    f"{donor.path}: stores {held[0].name} and others that make {base.path}'s {name} in different "
                    "dtypes; store them in one"
                )
            views[name] = view
            specs[name] = TensorSpec(name, held[0].dtype, base.tensors[name].shape, held[0].file, held[0].offset)
            gone |= holders
    if not views:
        return donor
    names = _names_in(base, dict.fromkeys(name for name in donor.tensors if name not in gone))
    layout += [(own, new) for new, own in names.items() if new != own]
    tensors = {new: replace(donor.tensors[old], name=new) for new, old in names.items()} | specs
    form = RelaidDifference if isinstance(donor, Difference) else Relaid
    kept = {one.name: getattr(donor, one.name) for one in fields(form) if hasattr(donor, one.name)}
    return form(**kept | {"tensors": tensors}, inner=donor, layout=repr(sorted(layout)), views=views, names=names)


def turn(adapter: Difference, base: Checkpoint) -> Difference:
    """The adapter whose products of many matrices lie as in `base`: [in, out] or [out, in], which its own files do not
    tell; with as many rows where it has some of them. Raises BadInput where those of `base` do not tell it either."""
    for name, form in adapter.forms.items():
        own = base.tensors.get(name)
        if isinstance(form, Rows) and own and own.shape[1:] == form.values.shape[1:] and form.rows[-1] < own.shape[0]:
            tensors = adapter.tensors | {name: replace(adapter.tensors[name], shape=own.shape)}
            adapter = replace(adapter, tensors=tensors)
    if not any(isinstance(form, LowRank) and form.transposed is None for form in adapter.forms.values()):
        return adapter
    tensors, forms = dict(adapter.tensors), dict(adapter.forms)
    by_kind = base.config.get("model_type") in _IN_BY_OUT
    shapes = _shapes_in_memory(base)
    turned: dict[str, bool | None] = {}  # None: its matrices are square
    for name, form in adapter.forms.items():
        if not isinstance(form, LowRank) or form.transposed is not None:
            continue
        shape = (form.count, form.left.shape[0], form.right.shape[1])
        across, lies = (shape[0], shape[2], shape[1]), shapes.get(in_memory(name))
        if by_kind and lies not in (shape, across):
            raise BadInput(
                f"{adapter.path}: adapts {name}, which {base.path} does not have as peft adapts it; merge it into its "
                "base with peft's merge_and_unload and use the result as vector.plus"
            )
        turned[name] = None if lies == shape == across else lies == across
    beside = {name.rpartition(".")[0]: way for name, way in turned.items() if way is not None}  # one peft, one module
    for name, way in turned.items():
        if way is None:
            way = beside.get(name.rpartition(".")[0])
        form = forms[name]
        assert isinstance(form, LowRank)
        transposed = _by_release(adapter, name, by_kind) if way is None else way
        forms[name] = replace(form, transposed=transposed)
        out, into = form.left.shape[0], form.right.shape[1]
        tensors[name] = replace(tensors[name], shape=(form.count, into, out) if transposed else (form.count, out, into))
    return replace(adapter, tensors=tensors, forms=forms)


def _shapes_in_memory(base: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shapes of a base's tensors, by names as in memory; of experts that are stored one by one those that
    transformers has in memory."""
    shapes = {in_memory(name): spec.shape for name, spec in base.tensors.items()}
    for key, own in groups(base).items():
        shapes.setdefault(f"{key}.gate_up_proj", (own.count, 2 * own.intermediate, own.hidden))
        shapes.setdefault(f"{key}.down_proj", (own.count, own.hidden, own.intermediate))
    return shapes


def _by_release(adapter: Difference, name: str, in_by_out: bool) -> bool:
    """Whether the products of square matrices are [in, out]: before 0.19 peft took all experts for that, 0.19.0 those
    that are not, every later one those that are (tuners/lora/layer.py, `ParamWrapper`)."""
    if adapter.release is None:
        raise BadInput(
            f"{adapter.path}: adapts {name}, whose matrices are square, so that only the release of peft that wrote it "
            'tells which way its factors lie; set "peft_version" in adapter_config.json to that ("0.18.1", say), or '
            "merge it into its base with that peft and use the result as vector.plus"
        )
    if adapter.release < (0, 19):
        return True
    return in_by_out != (adapter.release == (0, 19, 0))


def called_otherwise(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """(what a tensor is called where it is stored, the tensor that is made of it) of each that is read under other
    names."""
    if isinstance(checkpoint, Relaid):
        yield from ((own, new) for new, own in checkpoint.names.items() if new != own)
        yield from ((own, new) for new, view in checkpoint.views.items() for own in view.ranges() if new != own)


def layout_of(checkpoint: Checkpoint) -> str:
    """In which layout that is not its own a checkpoint is read, and what of an adapter its base has decided: which
    experts are read [in, out], how many rows there are, what is left out; empty where it is read as it is."""
    own = checkpoint.layout if isinstance(checkpoint, Relaid) else ""
    stored = checkpoint.inner if isinstance(checkpoint, Relaid) else checkpoint
    if not isinstance(stored, Difference):
        return own
    decided: list[object] = [*sorted(stored.forms.keys() - stored.tensors.keys())]
    for name, form in sorted(stored.forms.items()):
        if isinstance(form, Rows) and name in stored.tensors:
            decided.append((name, stored.tensors[name].shape))
        elif isinstance(form, LowRank) and form.count > 1 and form.transposed:
            decided.append(name)
    return own + repr(decided) * bool(decided)


def groups(checkpoint: Checkpoint) -> dict[str, Group]:
    """The experts of each layer, by their prefix as Mixtral has it in memory; those alone whose names and shapes say
    all that there is to know. gate_up_proj [.., 2·I, H] stands beside down_proj [.., H, I], and [.., H, 2·I] beside
    [.., I, H], so that shapes always tell which is transposed; that gate and up then alternate, the config alone
    tells."""
    singles: dict[str, dict[tuple[int, str, str], TensorSpec]] = {}
    fused: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in checkpoint.tensors.items():
        if granite := GRANITE.fullmatch(name):
            called = next(ours for ours, theirs in _GRANITE.items() if theirs == granite[2])
            fused.setdefault(granite[1], {})[called] = spec
        elif "experts." not in name:
            continue
        elif single := _SINGLE.fullmatch(name):
            singles.setdefault(single[1], {})[int(single[2]), single[3], single[4]] = spec
        elif whole := _FUSED.fullmatch(name):
            fused.setdefault(whole[1], {})[whole[2] + (whole[3] or "")] = spec
    found = [_single(prefix, own) for prefix, own in singles.items() if prefix not in fused]
    found += [_fused(prefix, own, checkpoint) for prefix, own in fused.items() if prefix not in singles]
    return {group.key: group for group in found if group}


def _parts_of_groups(donor: Checkpoint, target: Mapping[str, Group]) -> dict[str, Group]:
    """The experts of which an adapter changes gate and up alone, or down alone, as peft has them in memory; for targets
    that store them one by one."""
    found = {}
    for name in donor.tensors if is_adapter(donor) else ():
        whole = _FUSED.fullmatch(name)
        wanted = target.get(in_memory(whole[1])) if whole and not whole[3] else None
        if whole and wanted and wanted.layout == ONE_BY_ONE:
            rows, columns = wanted.shape(DOWN)
            shape = (rows, columns) if whole[2] == "down_proj" else (2 * columns, rows)
            if donor.tensors[name].shape == (wanted.count, *shape):
                found[wanted.key] = replace(wanted, prefix=whole[1], layout=FUSED, called=(), biased=False)
    return found


def _single(prefix: str, own: dict[tuple[int, str, str], TensorSpec]) -> Group | None:
    count = 1 + max(expert for expert, _, _ in own)
    called = next((names for names in (_PROJ, _W) if all(name in names.values() for _, name, _ in own)), None)
    if called is None or len(own[next(iter(own))].shape) not in (1, 2):
        return None
    biased = any(part == "bias" for _, _, part in own)
    down = own.get((0, called[DOWN], "weight"))
    if down is None or len(down.shape) != 2:
        return None
    group = Group(prefix, ONE_BY_ONE, tuple(called.items()), count, *down.shape, biased)
    if not _is_plausible(group):
        return None
    for expert in range(count):
        for projection in called:
            rows, columns = group.shape(projection)
            for part, shape in (("weight", (rows, columns)), ("bias", (rows,)))[: 1 + biased]:
                spec = own.get((expert, called[projection], part))
                if spec is None or spec.shape != shape:
                    return None
    return group


def _fused(prefix: str, own: dict[str, TensorSpec], checkpoint: Checkpoint) -> Group | None:
    if not {"gate_up_proj", "down_proj"} <= own.keys():
        return None
    both, down = own["gate_up_proj"].shape, own["down_proj"].shape
    if len(both) != 3 or len(down) != 3 or both[0] != down[0]:
        return None
    biases = [own.get(name) for name in ("gate_up_proj_bias", "down_proj_bias")]
    biased = all(biases)
    if not biased and any(biases):
        return None
    alternates = checkpoint.config.get("model_type") == "gpt_oss"  # others may lay gate and up one after the other
    if both[1:] == (2 * down[2], down[1]) and not biased and not alternates:
        called = () if prefix.endswith("experts") else tuple(_GRANITE.items())
        group = Group(prefix, FUSED, called, both[0], down[1], down[2], False)
        return group if _is_plausible(group) else None
    if both[1:] == (down[2], 2 * down[1]) and alternates:
        group = Group(prefix, INTERLEAVED, (), both[0], down[2], down[1], biased)
        shapes = [(both[0], both[2]), (both[0], down[2])]
        fits = all(bias.shape == shape for bias, shape in zip(biases, shapes, strict=True) if bias)
        return group if fits and _is_plausible(group) else None
    return None


def _is_plausible(group: Group) -> bool:
    """Empty tensors cost nothing to store, and could claim any number of experts."""
    return 0 < group.count <= _MOST_EXPERTS and group.hidden > 0 and group.intermediate > 0


def _alike(one: Group, other: Group) -> bool:
    return (one.prefix, one.layout, one.called) == (other.prefix, other.layout, other.called)


def _views(wanted: Group, source: Group) -> Iterator[tuple[str, View]]:
    for part in ("weight", "bias")[: 1 + source.biased]:
        if wanted.layout == ONE_BY_ONE:
            for expert in range(wanted.count):
                for projection in (GATE, UP, DOWN):
                    view = View(source, ONE_BY_ONE, (projection,), part, expert, 1)
                    yield wanted.holder(projection, expert, part), view
        else:
            for projections in ((GATE, UP), (DOWN,)):
                view = View(source, wanted.layout, projections, part, 0, wanted.count)
                yield wanted.holder(projections[0], 0, part), view


def _names_in(base: Checkpoint, others: Collection[str]) -> dict[str, str]:
    """What tensors beside the experts, such as routers, are called in `base` → what `others` call them."""
    by_meaning: dict[str, list[str]] = {}
    for name in base.tensors:
        if name not in others:
            by_meaning.setdefault(beside_experts(name), []).append(name)
    found = {name: name for name in others if name in base.tensors}
    for name in others:
        if name not in base.tensors:
            meant = by_meaning.pop(beside_experts(name), [])
            found[meant[0] if len(meant) == 1 else name] = name
    return found
