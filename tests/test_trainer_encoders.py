"""Pooling, the ways to call a model, and the student alone on disk."""

import pytest
import torch
from distilling import DIMS, Store, arguments, bert, gaussian, network, texts
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

from mtkd.nn import Projectors, TeacherNorm
from mtkd.trainer import DistillationTrainer, Encoder, export_student
from mtkd.trainer.encoders import pool


def rows(mask):
    """Tokens whose attended ones are known, and garbage where nothing is attended."""
    tokens = torch.arange(24.0).view(2, 4, 3)
    return torch.where(mask.bool().unsqueeze(-1), tokens, 1e6), tokens


@pytest.mark.parametrize(
    ("mask", "first", "last"),
    [
        (torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), (0, 0), (3, 1)),  # padding on the right
        (torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]), (0, 2), (3, 3)),  # and on the left
    ],
)
def test_pooling_reads_what_is_attended(mask, first, last):
    padded, tokens = rows(mask)
    for row in range(2):
        assert torch.equal(pool(padded, mask, "cls")[row], tokens[row, first[row]])
        assert torch.equal(pool(padded, mask, "last")[row], tokens[row, last[row]])
        mean = tokens[row, mask[row].bool()].mean(0)
        torch.testing.assert_close(pool(padded, mask, "mean")[row], mean)


def test_without_a_mask_all_tokens_count():
    tokens = torch.randn(2, 4, 3)
    assert torch.equal(pool(tokens, None, "cls"), tokens[:, 0])
    assert torch.equal(pool(tokens, None, "last"), tokens[:, -1])
    assert torch.equal(pool(tokens, None, "mean"), tokens.mean(1))


def batch(samples):
    return {
        key: torch.stack([torch.as_tensor(sample[key]) for sample in samples])
        for key in ("input_ids", "attention_mask", "row")
    }


class Tokens(torch.nn.Module):
    """A model that does not ask which tokens are padding."""

    def forward(self, input_ids):
        return input_ids.float().unsqueeze(-1)


def test_a_wrapper_is_called_as_what_it_wraps():
    model = bert().eval()
    wrapped = Encoder(torch.compile(model, backend="eager"), "mean")
    assert wrapped.keys == Encoder(model, "mean").keys
    given = batch(texts(4))
    torch.testing.assert_close(wrapped(given), Encoder(model, "mean")(given))


def test_pooling_knows_padding_that_the_model_does_not():
    given = batch(texts(4)[1::2])
    for encoder in (Encoder(Tokens(), "mean"), Encoder(Tokens(), "mean", inputs=("input_ids",))):
        assert "attention_mask" in encoder.keys
        expected = given["input_ids"][:, :5].float().mean(1, keepdim=True)
        torch.testing.assert_close(encoder(given), expected)


def test_padding_does_not_move_an_embedding():
    model, given = bert().eval(), batch(texts(4)[1::2])
    short = {key: value[:, :5] if value.dim() > 1 else value for key, value in given.items()}
    for pooling in ("cls", "last", "mean", "pooler"):
        encoder = Encoder(model, pooling)
        torch.testing.assert_close(encoder(given), encoder(short))
    output = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
    assert torch.equal(Encoder(model, "pooler")(given), output.pooler_output)


class Sentences(nn.Sequential):
    """As sentence-transformers' models are called: a dictionary in, a dictionary out."""

    def encode(self, texts): ...

    def forward(self, features):
        assert set(features) == {"input_ids", "attention_mask"}
        tokens = self[0](features["input_ids"])
        return features | {"token_embeddings": tokens, "sentence_embedding": tokens.mean(1)}


def test_a_sentence_transformers_model_gets_one_dictionary():
    model, given = Sentences(nn.Embedding(40, 6)), batch(texts(4))
    encoder = Encoder(model)
    assert encoder.keys == ("input_ids", "attention_mask", "token_type_ids")
    torch.testing.assert_close(encoder(given), model[0](given["input_ids"]).mean(1))


def test_a_teacher_s_keys_have_its_prefix():
    model, given = bert().eval(), batch(texts(4))
    renamed = {f"teacher_{key}": value for key, value in given.items()}
    encoder = Encoder(model, "mean", prefix="teacher_")
    assert torch.equal(encoder(renamed | {"input_ids": None}), Encoder(model, "mean")(given))


class Tied(nn.Module):
    """A module with one tensor under two names, a buffer, and a part thrown away after training."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(8, 6, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("offset", torch.randn(6))
        self.heads = Projectors(6, DIMS)

    def forward(self, x):
        return self.first(x) + self.second(x) + self.offset


def test_a_hugging_face_student_is_exported_for_automodel(tmp_path):
    trainer = DistillationTrainer(
        Encoder(bert(), "mean"), gaussian(), Store(), arguments(tmp_path / "run", max_steps=2),
        train_dataset=texts(), norm=TeacherNorm(DIMS),
    )  # fmt: skip
    trainer.train()
    trainer.export_student(tmp_path / "student")
    loaded, given = AutoModel.from_pretrained(tmp_path / "student").eval(), batch(texts(4))
    ours = trainer.student.eval()
    assert torch.equal(Encoder(loaded, "mean")(given), ours(given))
    assert loaded.state_dict().keys() == ours.model.state_dict().keys()


def test_any_other_student_is_exported_as_a_state_dict(tmp_path):
    for number, model in enumerate((network().model, Tied())):
        export_student(Encoder(model, inputs=("x",)), tmp_path / str(number))
        state = load_file(tmp_path / str(number) / "model.safetensors")
        assert not any("heads" in name for name in state)
        other = type(model)() if isinstance(model, Tied) else network().model
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(state, strict=not isinstance(model, Tied))
        x = torch.randn(3, 8)
        assert torch.equal(other(x), model(x))
    with pytest.raises(TypeError, match=r"student: expected a torch.nn.Module, got int"):
        export_student(3, tmp_path)


def test_a_tokenizer_goes_with_the_student(tmp_path):
    class Tokenizer:
        model_input_names = ("input_ids",)

        def save_pretrained(self, folder):
            (tmp_path / "student" / "tokenizer.json").write_text("{}")

    trainer = DistillationTrainer(
        Encoder(bert(), "mean"), gaussian(), Store(), arguments(tmp_path / "run"),
        processing_class=Tokenizer(),
    )  # fmt: skip
    trainer.export_student(tmp_path / "student")
    files = {path.name for path in (tmp_path / "student").iterdir()}
    assert files == {"config.json", "model.safetensors", "tokenizer.json"}
