"""From a batch to one embedding a row: how a model is called, how its tokens are pooled."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._signature import forward_arguments

POOLINGS = ("cls", "last", "mean", "pooler")
TOKENS = ("input_ids", "attention_mask", "token_type_ids")
SENTENCE = "sentence_embedding"


class Encoder(nn.Module):
    """A model as a function of a batch that returns embeddings: a student, or a teacher.

    Args:
        model: the model. Its call takes what it names: the batch's keys that are arguments of its
            `forward`. A sentence-transformers model gets one dictionary, as it expects.
        pooling: how the tokens ``(N, L, H)`` of a Hugging Face encoder become one embedding: "cls"
            (the first that is attended), "last", "mean" (over those attended) or "pooler" (what
            the model itself pools). None where the model returns embeddings.
        inputs: the keys of the batch to pass by position instead, such as ``("pixel_values",)``
            for a timm model; for sentence-transformers, the keys of its dictionary.
        prefix: what the keys of this model begin with in the batch. A teacher with a tokenizer of
            its own reads ``teacher_input_ids`` with ``prefix="teacher_"``.

    Shape:
        - a batch: a mapping of tensors, N rows each. Returns ``(N, H)``.

    Returns:
        The embeddings, as the model makes them.

    Raises:
        ValueError: an unknown pooling, a key that the batch lacks, an output without an embedding.

    Note:
        "cls" and "last" look for the first and last token that `attention_mask` attends to, so
        padding may be on either side; without that key all tokens count.

    Example:
        >>> import torch
        >>> from mtkd.trainer import Encoder
        >>> student = Encoder(torch.nn.Linear(8, 4), inputs=("x",))
        >>> student({"x": torch.randn(3, 8), "row": torch.arange(3)}).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        pooling: str | None = None,
        *,
        inputs: Sequence[str] | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if pooling is not None and pooling not in POOLINGS:
            expected = ", ".join(POOLINGS)
            raise ValueError(f"pooling: expected None or one of {expected}, got {pooling!r}")
        if isinstance(inputs, str):
            raise TypeError(f"inputs: expected a sequence of keys, got the string {inputs!r}")
        self.model, self.pooling, self.prefix = model, pooling, prefix
        # sentence-transformers' models are sequences of modules that pass a dictionary on
        self.takes_mapping = isinstance(model, nn.Sequential) and hasattr(model, "encode")
        self.positional = inputs is not None and not self.takes_mapping
        self.names, self.required = self._arguments(inputs)

    def _arguments(self, inputs: Sequence[str] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names that the model takes, and those it cannot do without."""
        if inputs is not None:
            return tuple(inputs), tuple(inputs)
        if self.takes_mapping:
            tokenizer = getattr(self.model, "tokenizer", None)
            return tuple(getattr(tokenizer, "model_input_names", TOKENS)), ()
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        named = [p for p in forward_arguments(self.model).values() if p.kind in kinds]
        required = tuple(p.name for p in named if p.default is inspect.Parameter.empty)
        return tuple(p.name for p in named), required

    @property
    def keys(self) -> tuple[str, ...]:
        """The batch's keys that the model, or the pooling of its tokens, may read."""
        pooled = (TOKENS[1],) if self.pooling in ("cls", "last", "mean") else ()
        return tuple(self.prefix + name for name in dict.fromkeys((*self.names, *pooled)))

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the embeddings of a batch."""
        given = {n: batch[self.prefix + n] for n in self.names if self.prefix + n in batch}
        missing = [self.prefix + name for name in self.required if name not in given]
        if missing or not given:
            expected = ", ".join(missing or self.keys)
            raise ValueError(
                f"batch: expected key {expected} for {type(self.model).__name__},"
                f" got {', '.join(map(str, batch))}; inputs=(...) names the keys to pass"
            )
        attention = batch.get(self.prefix + TOKENS[1])  # the model itself may not ask for it
        if self.takes_mapping:
            return self._pool(self.model(given), attention)
        if self.positional:
            return self._pool(self.model(*given.values()), attention)
        return self._pool(self.model(**given), attention)

    def _pool(self, output: Any, attention: Tensor | None) -> Tensor:
        if self.pooling is None:
            output = output.get(SENTENCE, output) if isinstance(output, Mapping) else output
            return self._tensor(output, "an embedding")
        if self.pooling == "pooler":
            return self._tensor(getattr(output, "pooler_output", None), "a pooler_output")
        tokens = getattr(output, "last_hidden_state", output)
        tokens = self._tensor(tokens, "a last_hidden_state or a tensor")
        if tokens.dim() != 3 or (attention is not None and attention.shape != tokens.shape[:2]):
            given = "" if attention is None else f", attention_mask {tuple(attention.shape)}"
            got = f"{tuple(tokens.shape)}{given}"
            raise ValueError(f"student: expected tokens (N, L, H) to pool, got shape {got}")
        return pool(tokens, attention, self.pooling)

    def _tensor(self, output: Any, expected: str) -> Tensor:
        if not isinstance(output, Tensor):
            kind, model = type(output).__name__, type(self.model).__name__
            raise ValueError(
                f"student: expected {expected} from {model} with pooling={self.pooling!r},"
                f" got {kind}; pooling may be {', '.join(POOLINGS)}"
            )
        return output


def pool(tokens: Tensor, attention: Tensor | None, pooling: str) -> Tensor:
    """Return one embedding ``(N, H)`` a row of tokens ``(N, L, H)``; see `Encoder`."""
    if attention is None:
        chosen = {"cls": lambda: tokens[:, 0], "last": lambda: tokens[:, -1]}
        return chosen.get(pooling, lambda: tokens.mean(1))()
    attended = attention.bool()
    if pooling == "mean":
        weights = attended.unsqueeze(-1).to(tokens.dtype)
        return (tokens * weights).sum(1) / weights.sum(1).clamp(min=1)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    if pooling == "last":
        index = torch.where(attended, positions, 0).amax(1)
    else:
        index = torch.where(attended, positions, tokens.shape[1] - 1).amin(1)
    return tokens[torch.arange(len(tokens), device=tokens.device), index]


def as_encoder(name: str, model: Any) -> Encoder:
    """Return a model as an `Encoder`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module or an Encoder, got {_kind(model)}")
    return model if isinstance(model, Encoder) else Encoder(model)


def _kind(argument: Any) -> str:
    return type(argument).__name__
