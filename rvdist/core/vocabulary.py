"""Whose tokens an output has, and where a model's rows come from for tokens that it lacks.

Source: mergekit 0.1.5's `tokenizer` block, whose rules these are. Knows names of models and tokens, and opens nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

from rvdist.core.errors import BadInput
from rvdist.core.foreign import parse_yaml

UNION, BASE = "union", "base"
_MOST = 1 << 13  # rows to pad to a multiple of; those of published models are 64 to 4,096
Refuse = Callable[[str, str], NoReturn]  # a key, and why not


@dataclass(frozen=True)
class TokenRule:
    """Where models that lack `token` take its row from, with `force` all of them: from the row of the same token in
    `model`, of its token `other`, or of its id `row`; without a model it is 0."""

    token: str
    model: str | None = None
    other: str | None = None
    row: int | None = None
    force: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer of an output: `union`, `base`, or that of a model or directory. `models` are those whose tokens
    count, the base first; `multiple`: of how many the number of rows is a multiple, None where they are as many as
    tokens."""

    source: str
    models: tuple[str, ...]
    rules: tuple[TokenRule, ...] = ()
    multiple: int | None = None

    def __str__(self) -> str:
        own = {UNION: "the union of all tokenizers", BASE: "the target's"}.get(self.source, f"that of {self.source}")
        return f"the tokenizer is {own}"

    def places(self) -> tuple[str, ...]:
        """Whatever it names that lies somewhere."""
        return self.models if self.source in (UNION, BASE) else (*self.models, self.source)

    def relocate(self, places: Mapping[str, str]) -> Vocabulary:
        """The same with each model replaced by the place where it was found."""
        rules = tuple(replace(rule, model=places.get(rule.model or "", rule.model)) for rule in self.rules)
        models = tuple(places.get(model, model) for model in self.models)
        source = self.source if self.source in (UNION, BASE) else places.get(self.source, self.source)
        return replace(self, source=source, models=models, rules=rules)

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold, and `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Vocabulary:
        """The vocabulary of `to_json`. Raises LookupError or TypeError for what is none."""
        rules = tuple(TokenRule(**rule) for rule in data["rules"])
        return cls(data["source"], tuple(data["models"]), rules, data["multiple"])


def vocabulary_of(given: Any, models: Sequence[str]) -> Vocabulary | None:
    """What our own key `tokenizer` asks for, which calls the base `target`; None for nothing. Raises BadInput."""

    def refuse(key: str, why: str) -> NoReturn:
        raise BadInput(f"{key}: {why}")

    if given is None:
        return None
    if isinstance(given, str) and given.startswith("{"):  # Hydra's own braces hold no token that needs quotes
        try:
            given = parse_yaml(given.encode())
        except ValueError as error:
            refuse("tokenizer", f"is not YAML: {error}")
    if isinstance(given, Mapping) and given.get("source") == "target":
        given = {**given, "source": BASE}
    return read_vocabulary(BASE if given == "target" else given, "tokenizer", models, refuse)


def read_vocabulary(given: Any, key: str, models: Sequence[str], refuse: Refuse) -> Vocabulary:
    """What the value of `key` asks for: a source, or a mapping of source, tokens and pad_to_multiple_of. `refuse` is
    called for what we do not have."""
    if not isinstance(given, Mapping):
        return Vocabulary(_source(given, key, refuse), tuple(models))
    for name in given:
        if name not in ("source", "tokens", "pad_to_multiple_of"):
            refuse(f"{key}.{name}", "is not supported, only source, tokens and pad_to_multiple_of")
    tokens, multiple = given.get("tokens"), given.get("pad_to_multiple_of")
    if tokens is not None and not isinstance(tokens, Mapping):
        refuse(f"{key}.tokens", f"{tokens!r} is not a mapping of tokens to where their rows come from")
    if multiple is not None and (type(multiple) is not int or not 0 <= multiple <= _MOST):
        refuse(f"{key}.pad_to_multiple_of", f"{multiple!r} is not a number of rows from 0 to {_MOST:,}")
    return Vocabulary(
        _source(given.get("source") or UNION, f"{key}.source", refuse),
        tuple(models),
        tuple(_rule(token, own, f"{key}.tokens.{token}", models, refuse) for token, own in (tokens or {}).items()),
        multiple or None,
    )


def _source(given: Any, key: str, refuse: Refuse) -> str:
    if not isinstance(given, str) or not given or "+" in given:
        refuse(key, f"{given!r} is not union, base, or the name of a model")
    return given


def _rule(token: Any, given: Any, key: str, models: Sequence[str], refuse: Refuse) -> TokenRule:
    if not isinstance(token, str) or not token:
        refuse(key, f"{token!r} is not a token; write it as a text in quotes")
    if not isinstance(given, Mapping) or given.get("source") is None or given.keys() - {"source", "force"}:
        refuse(key, "has to be a mapping of source and, if all models take that row, force")
    force, source = given.get("force", False), given["source"]
    if not isinstance(force, bool):
        refuse(f"{key}.force", f"{force!r} is not true or false")
    if isinstance(source, str):
        return TokenRule(token, _model(source, key, models, refuse), force=force)
    kind = source.get("kind") if isinstance(source, Mapping) else None
    if kind == "zero" and source.keys() == {"kind"}:
        return TokenRule(token, force=force)
    if kind != "model_token" or source.keys() - {"kind", "model", "token", "token_id"}:
        refuse(
            f"{key}.source", f"{source!r} is no model, nor {{kind: zero}} or {{kind: model_token, model: …, token: …}}"
        )
    other, row = source.get("token"), source.get("token_id")
    if (other is None) == (row is None):
        refuse(f"{key}.source", "wants token or token_id, one of them")
    if other is not None and not isinstance(other, str):
        refuse(f"{key}.source.token", f"{other!r} is not a token")
    if row is not None and (type(row) is not int or row < 0):
        refuse(f"{key}.source.token_id", f"{row!r} is not an id")
    return TokenRule(token, _model(source.get("model"), key, models, refuse), other, row, force)


def _model(given: Any, key: str, models: Sequence[str], refuse: Refuse) -> str:
    if given not in models:
        refuse(f"{key}.source", f"{given!r} is not one of the models of this merge ({', '.join(models)})")
    return str(given)
