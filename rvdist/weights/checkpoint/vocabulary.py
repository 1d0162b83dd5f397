"""Gives the checkpoints of a point the tokens that its output has: which row of which of them is whose.

Source: mergekit 0.1.5, whose rules these are (docs/recipes.md). Reads tokenizers, and of tensors only headers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from rvdist.core.errors import BadInput
from rvdist.core.point import WeightPoint
from rvdist.core.vocabulary import BASE, UNION, TokenRule, Vocabulary
from rvdist.weights.checkpoint.adapted import MERGE, Adapted, adapt, as_it_is, require_rows
from rvdist.weights.checkpoint.difference import Difference
from rvdist.weights.checkpoint.directory import Checkpoint, read_json
from rvdist.weights.checkpoint.fp8 import Scaled
from rvdist.weights.checkpoint.remapped import MEAN, PADDING, ZERO, Numbers, Remapped, Rows, kind_of
from rvdist.weights.checkpoint.tokens import Added, Built, Tokens, build, has_tokens, read_tokens, strip, unite

Open = Callable[[str], Checkpoint]
Place = tuple[str, ...]  # of a part in a configuration: keys, from the outermost
_NAME = r"(?:embed_tokens|wte|embed_in|word_embeddings|shared|lm_head|embed_out)"
_BY_TOKEN = re.compile(rf"(?:.+\.)?{_NAME}\.(?:weight|bias)")
_ALIKE = re.compile(r".*(?:emb|head|vocab|lm_).*")
_IDS = re.compile(r".*_token_(?:ids?|index)")
_LAYER = re.compile(r"(?:.+\.)?\d+\..+")
_VOCABULARY = re.compile(r"(?!type_).+_vocab_size.*|vocab_size_.+")  # of other tokens than the embedding's
_PARTS = ("text_config", "llm_config", "language_config")
_UNKNOWN = "and it is not known whether these are the tokenizer's tokens; leave tokenizer out"


def remap(point: WeightPoint, sources: Mapping[str, Checkpoint], opened: Open) -> dict[str, Checkpoint]:
    """The point's sources whose rows are to be others than they have, by name: none where all have the tokens that are
    asked for at the same ids. `opened` gives a model that is no source. Raises BadInput."""
    vocabulary = point.vocabulary
    assert vocabulary is not None
    models = {name: sources[name] if name in sources else opened(name) for name in vocabulary.models}
    models = {name: one for name, one in models.items() if not _leaves_rows(one, models[point.base])}
    first: dict[tuple[Path, Collection[str]], str] = {}  # a model under several names is one
    called = {
        name: first.setdefault((one.path.absolute(), frozenset(one.tensors)), name) for name, one in models.items()
    }
    vocabulary = vocabulary.relocate(called)
    vocabulary = replace(vocabulary, models=tuple(name for name in models if called[name] == name))
    models = {name: models[name] for name in vocabulary.models}
    plain = vocabulary.source == BASE and not vocabulary.rules and not vocabulary.multiple
    if plain and not any(has_tokens(one.beside) for one in models.values()):
        return {}  # nothing was compared, as is said of such models
    base = models[point.base]
    names = _named_by_token(base)
    adapters = {name: one for name, one in models.items() if isinstance(one, Difference)}
    made = {name: adapt(one, _trained_on(point, sources, called, name), names) for name, one in adapters.items()}
    models |= made
    rows = {model: _row_count(one, names) for model, one in models.items()}
    tokens = {model: read_tokens(one.beside) for model, one in models.items()}
    for name, adapted in made.items():
        require_rows(adapted, tokens[name])
    tokens[point.base] = strip(tokens[point.base], rows[point.base])
    built = _tokenizer(vocabulary, tokens, rows, opened)
    found: dict[str, Checkpoint] = {}
    own_rows = {model: _rows_of(built, tokens[model], rows[model]) for model in models}
    for name, one in adapters.items():
        if any(rule.force for rule in vocabulary.rules) or not np.array_equal(
            own_rows[name], np.arange(len(built.ids))
        ):
            raise BadInput(
                f"{one.path}: is an adapter with rows for tokens, and in the output some ids are of others, or a rule "
                f"has force; {MERGE}"
            )
    maps = {name: _Maps(vocabulary, models, tokens, own_rows, built, name) for name in names}
    for source in filter(called.__contains__, point.sources()):
        model = called[source]
        if model in adapters:  # it says what rows become, of the ids that they have: a difference from the base's
            found[source] = _cut(adapters[model], names, len(built.ids))
            continue
        held, is_base = models[model], models[model] is base
        own = {name: maps[name].rows(model) for name in names}
        new = _remapped(held, own, built if is_base else None, tokens[model])
        remade = is_base and (built.limit is not None or built.added or built.where != base.beside)
        if remade or not all(_is_identity(rows, held.tensors[name].shape[0]) for name, rows in new.rows.items()):
            found[source] = new
    return found


def _remapped(
    one: Checkpoint, own: Mapping[str, tuple[Rows, tuple[Checkpoint, ...]]], tokenizer: Built | None, tokens: Tokens
) -> Remapped:
    """The checkpoint with these rows: each tensor has its own lenders, which become one list."""
    lenders = list({id(lender): lender for _, of in own.values() for lender in (one, *of)}.values())
    place = {id(lender): number for number, lender in enumerate(lenders)}
    rows, tensors = {}, dict(one.tensors)
    for name, (map_, of) in own.items():
        numbers = np.array([place[id(lender)] for lender in of], np.int32)
        owner = np.where(map_.owner >= 0, numbers[map_.owner.clip(0)], map_.owner).astype(np.int32)
        means = tuple(tuple((int(numbers[k]), row) for k, row in mean) for mean in map_.means)
        rows[name] = Rows(owner, map_.row, means)
        tensors[name] = replace(one.tensors[name], shape=(len(owner), *one.tensors[name].shape[1:]))
    kind, as_it_is = kind_of(one)
    kept = {part.name: getattr(one, part.name) for part in fields(as_it_is)} | {"tensors": tensors}
    changed, generation = dict[str, Any](), None
    if tokenizer:
        changed = _changed(one, tokenizer, tokens, len(next(iter(rows.values())).owner))
        path = one.beside / "generation_config.json"
        if path.exists() and (ids := _new_ids(path, read_json(path), tokenizer, tokens)):
            generation = read_json(path) | ids
    there = tuple(replace(lender, path=lender.path.absolute()) for lender in lenders)  # wherever it is read
    return kind(**kept, lenders=there, rows=rows, tokenizer=tokenizer, changed=changed, generation=generation)


class _Maps:
    """Where the rows of one tensor come from in each of the models that have it."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        models: Mapping[str, Checkpoint],
        tokens: Mapping[str, Tokens],
        own: Mapping[str, Numbers],
        built: Built,
        name: str,
    ) -> None:
        self._names, self._lenders = vocabulary.models, tuple(models[model] for model in vocabulary.models)
        self._built, self._tensor = built, name
        count, multiple = len(built.ids), vocabulary.multiple or 1
        self._count, self._padded = count, -(-count // multiple) * multiple
        self._own: Numbers = np.stack([own[model] for model in self._names])
        self._has = self._own >= 0
        self._force = np.zeros(count, bool)
        self._decide(vocabulary)
        for rule in vocabulary.rules:
            self._follow(rule, tokens)

    def _decide(self, vocabulary: Vocabulary) -> None:
        """The row of a token in models that lack it: of the one that has it, or of the base, or the mean of several."""
        holders = self._has.sum(0)
        first = self._has.argmax(0)  # the base, if that has it
        self._owner = np.where(holders == 0, ZERO, first).astype(np.int32)
        self._row = np.where(holders == 0, 0, self._own[first, np.arange(self._count)]).astype(np.int32)
        several = (holders > 1) & ~self._has[0]
        self._means: list[tuple[tuple[int, int], ...]] = []
        ruled = {self._built.ids[rule.token] for rule in vocabulary.rules}
        for number in np.flatnonzero(several).tolist():
            if number in ruled:
                continue
            self._owner[number], self._row[number] = MEAN, len(self._means)
            holding = np.flatnonzero(self._has[:, number]).tolist()
            self._means.append(tuple((k, int(self._own[k, number])) for k in holding))

    def _follow(self, rule: TokenRule, tokens: Mapping[str, Tokens]) -> None:
        number = self._built.ids[rule.token]
        self._force[number] = rule.force
        if not rule.force and self._has[:, number].all():
            return
        if rule.model is None:
            self._owner[number], self._row[number] = ZERO, 0
            return
        key = f"tokenizer.tokens.{rule.token}.source"
        if rule.model not in self._names:
            raise BadInput(
                f"{key}: takes a row of {rule.model}, which has no tensor {self._tensor}; name another model"
            )
        k = self._names.index(rule.model)
        if rule.row is not None:
            row, most = rule.row, self._lenders[k].tensors[self._tensor].shape[0]
            if row >= most:
                raise BadInput(f"{key}: takes row {row} of {rule.model}, which has {most} rows")
        else:
            wanted = rule.token if rule.other is None else rule.other
            row = int(self._own[k, number]) if rule.other is None else tokens[rule.model].ids.get(wanted, -1)
            if not 0 <= row < self._lenders[k].tensors[self._tensor].shape[0]:
                raise BadInput(f"{key}: takes the row of token {wanted!r} of {rule.model}, which has no such token")
        self._owner[number], self._row[number] = k, row

    def rows(self, model: str) -> tuple[Rows, tuple[Checkpoint, ...]]:
        """Those of a model, and the checkpoints among which they are."""
        k = self._names.index(model)
        own = self._has[k] & ~self._force
        owner = np.full(self._padded, PADDING, np.int32)
        row = np.zeros(self._padded, np.int32)
        owner[: self._count] = np.where(own, k, self._owner)
        row[: self._count] = np.where(own, self._own[k], self._row)
        return self._flatten(owner, row)

    def _flatten(self, owner: Numbers, row: Numbers) -> tuple[Rows, tuple[Checkpoint, ...]]:
        """The same with what adapters make of a model where it lies: in their files, and in that model."""
        lenders: list[Checkpoint] = []
        new_owner, new_row, places = owner.copy(), row.copy(), list[tuple[Numbers, Numbers]]()
        for k, one in enumerate(self._lenders):
            of, its, there = one.places[self._tensor] if isinstance(one, Adapted) else as_it_is(one, self._tensor)
            places.append((its + np.int32(len(lenders)), there))
            own = owner == k
            new_owner[own], new_row[own] = places[k][0][row[own]], there[row[own]]
            lenders += of
        means = tuple(tuple((int(places[k][0][n]), int(places[k][1][n])) for k, n in mean) for mean in self._means)
        return Rows(new_owner, new_row, means), tuple(lenders)


def _tokenizer(vocabulary: Vocabulary, tokens: Mapping[str, Tokens], rows: Mapping[str, int], opened: Open) -> Built:
    """That of the output, with a token for every rule."""
    start, new = tokens[vocabulary.models[0]], list[Added]()
    if vocabulary.source == UNION:
        new = unite([(tokens[model], rows[model]) for model in vocabulary.models])
    elif vocabulary.source in tokens:
        start = read_tokens(tokens[vocabulary.source].where)  # with what the base has no rows for
    elif vocabulary.source != BASE:
        path = Path(vocabulary.source).expanduser()
        start = read_tokens(path if path.is_dir() else opened(vocabulary.source).beside)
    known = start.ids.keys() | {one.content for one in new}
    return build(start, new + [Added(rule.token) for rule in vocabulary.rules if rule.token not in known])


def _rows_of(built: Built, tokens: Tokens, rows: int) -> Numbers:
    """The row of a model, which has so many, for each id of the output; -1 where it has none."""
    own: Numbers = np.full(len(built.ids), -1, np.int32)
    for token, number in built.ids.items():
        if (row := tokens.ids.get(token, -1)) < rows:
            own[number] = row
    return own


def _is_identity(rows: Rows, count: int) -> bool:
    return len(rows.owner) == count and bool((rows.owner == 0).all()) and bool((rows.row == np.arange(count)).all())


def _leaves_rows(one: Checkpoint, base: Checkpoint) -> bool:
    """Whether it is a difference that changes nothing that has a row for each token."""
    if not isinstance(one, Difference) or one is base:
        return False
    return one.tensors.keys().isdisjoint(_named_by_token(base))


def _trained_on(
    point: WeightPoint, sources: Mapping[str, Checkpoint], called: Mapping[str, str], adapter: str
) -> Checkpoint | None:
    """What an adapter was trained on: the minus beside it, else the base; None where that differs from term to term."""
    vectors = [term.vector for term in point.terms if called.get(term.vector.plus) == adapter]
    names = {vector.minus or point.base for vector in vectors}
    found = sources[names.pop()] if len(names) == 1 else None
    return None if isinstance(found, Difference) else found


def _cut(one: Difference, names: Sequence[str], count: int) -> Difference:
    """Without rows that no token has: of those for tokens it has as many."""
    own = {name: one.tensors[name] for name in names if name in one.tensors}
    return replace(one, tensors=one.tensors | {n: replace(t, shape=(count, *t.shape[1:])) for n, t in own.items()})


def _named_by_token(base: Checkpoint) -> list[str]:
    """The tensors that have a row for each token. Raises BadInput where that is not plain."""
    names = [name for name, spec in base.tensors.items() if _BY_TOKEN.fullmatch(name) and spec.numel]
    counts = {base.tensors[name].shape[0] for name in names}
    parts = _plain_parts(base.config).values()
    said = [pair for config in parts for pair in config.items() if _VOCABULARY.fullmatch(pair[0])]
    counts |= {size for _, size in said if type(size) is int}
    if not names:
        raise BadInput(f"{base.path}: has no tensor that is called as an embedding is; leave tokenizer out")
    for name, spec in base.tensors.items():
        if name in names or counts.isdisjoint(spec.shape):
            continue
        if _ALIKE.fullmatch(name) or not _LAYER.fullmatch(name):
            raise BadInput(
                f"{base.path}: tensor {name} has as many rows as the vocabulary ({list(spec.shape)}), and it is not "
                "known whether these are tokens; leave tokenizer out"
            )
    return names


def _row_count(one: Checkpoint, names: Sequence[str]) -> int:
    """How many rows are tokens: as many as its configuration says."""
    for name in names:
        if name not in one.tensors or not one.tensors[name].shape:
            raise BadInput(
                f"{one.path}: has no {name}, of which the target has a row for each token; store both with a head of "
                "their own, or both without"
            )
        if not one.tensors[name].is_floating_point:
            raise BadInput(f"{one.path}: tensor {name} is stored as {one.tensors[name].dtype}; store it as bf16")
        if isinstance(one, Scaled) and name in one.scales:
            raise BadInput(f"{one.path}: tensor {name} is quantised, and its rows are asked for; store it as bf16")
    held = [one.tensors[name].shape[0] for name in names]
    said = [part["vocab_size"] for part in _parts(one, held).values() if "vocab_size" in part]
    if any(type(size) is not int or not 0 < size <= min(held) for size in said):
        raise BadInput(f"{one.path}: its config.json has vocab_size={said[0]}, and {names[0]} has {min(held)} rows")
    return min([*held, *map(int, said)])


def _plain_parts(config: Mapping[str, Any]) -> dict[Place, Mapping[str, Any]]:
    """The parts of a configuration that speak of the tokenizer's tokens whatever they say, itself the first."""
    return {(): config} | {(part,): config[part] for part in _PARTS if isinstance(config.get(part), Mapping)}


def _parts(one: Checkpoint, held: Sequence[int]) -> dict[Place, Mapping[str, Any]]:
    """The parts of a model's configuration that speak of the tokenizer's tokens: the plain ones, and at any depth what
    counts as many as these or as there are rows. Raises BadInput where only others count any."""
    plain, others = _plain_parts(one.config), _others(one.config, ())
    said = {part["vocab_size"] for part in plain.values() if type(part.get("vocab_size")) is int}
    counted = {place: part["vocab_size"] for place, part in others.items() if type(part.get("vocab_size")) is int}
    alike = {place: others[place] for place, size in counted.items() if size in {*held, *said}}
    if counted and not said and not alike:
        place, size = next(iter(counted.items()))
        key = ".".join([*place, "vocab_size"])
        raise BadInput(f"{one.beside / 'config.json'}: {key} is {size}, the embedding has {held[0]} rows, {_UNKNOWN}")
    return plain | alike


def _others(config: Mapping[str, Any], place: Place) -> dict[Place, Mapping[str, Any]]:
    """The parts of a configuration, and of these, but for the plain ones."""
    found: dict[Place, Mapping[str, Any]] = {}
    for key, part in config.items():
        if isinstance(part, Mapping):
            found |= {(*place, key): part} if place or key not in _PARTS else {}
            found |= _others(part, (*place, key))
    return found


def _changed(base: Checkpoint, tokenizer: Built, tokens: Tokens, rows: int) -> dict[str, Any]:
    """What a configuration says otherwise of a model with so many rows and this tokenizer; its parts are mappings."""
    found: dict[str, Any] = {}
    path, held = base.beside / "config.json", [base.tensors[name].shape[0] for name in _named_by_token(base)]
    parts, plain = _parts(base, held), _plain_parts(base.config)
    said = any("vocab_size" in config for config in parts.values())  # else the architecture's own number counts
    for place, config in parts.items():
        own = _new_ids(path, config, tokenizer, tokens)
        own |= {"vocab_size": rows} if "vocab_size" in config or (not said and place == [*plain][-1]) else {}
        _put(found, place, own)
    for place, config in _others(base.config, ()).items():
        if place not in parts and (ids := _new_ids(path, config, tokenizer, tokens)):
            key = next(iter(ids))
            raise BadInput(f"{path}: {'.'.join([*place, key])} is {config[key]}, {_UNKNOWN}")
    return found


def _put(found: dict[str, Any], place: Place, own: Mapping[str, Any]) -> None:
    for key in place if own else ():
        found = found.setdefault(key, {})
    found.update(own)


def _new_ids(path: Path, config: Mapping[str, Any], tokenizer: Built, tokens: Tokens) -> dict[str, Any]:
    """The ids of a configuration that are others in the tokenizer of the output. Raises BadInput for one that is none
    there, or that names no token of the model's own and would name one."""
    token_of = {number: token for token, number in (tokens.ids | tokens.gone).items()}
    own = tokenizer.where == tokens.where

    def new(key: str, given: Any) -> Any:
        if isinstance(given, list):
            return [new(key, one) for one in given]
        if type(given) is not int or given < 0:
            return given
        token = token_of.get(given)
        if own and token not in tokenizer.ids and given >= len(tokenizer.ids):
            return given  # no token, before and after
        if token not in tokenizer.ids:
            what = "which names no token" if token is None else f"token {token!r}"
            lacking = "has no row for" if own else f"the tokenizer of {tokenizer.where} lacks"
            raise BadInput(
                f"{path}: {key} is {given}, {what}, which {'the model ' if own else ''}{lacking}; add it by "
                f"tokenizer.tokens{'' if own else ', or choose tokenizer=union'}"
            )
        return tokenizer.ids[token]

    ids = {key: new(key, value) for key, value in config.items() if _IDS.fullmatch(key)}
    return {key: value for key, value in ids.items() if value != config[key]}
