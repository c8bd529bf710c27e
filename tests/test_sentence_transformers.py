"""The loss for sentence-transformers: by itself, and in its own trainer where that is installed."""

import pytest
import torch
from torch import nn

from mtkd.integrations.sentence_transformers import DistillationLoss
from mtkd.nn import GaussianHeads, Ladder, Projectors, TeacherNorm

DIMS = {"bow": 3, "pca": 5}


class Student(nn.Linear):
    """What the loss asks of a SentenceTransformer."""

    def forward(self, features):
        return {"sentence_embedding": super().forward(features["x"])}


@pytest.fixture
def batch():
    torch.manual_seed(0)
    features = [{"x": torch.randn(6, 4)}, {"x": torch.randn(6, 4)}]
    labels = torch.randn(6, 8)
    labels[1:3, 3:] = float("nan")
    return features, labels


@pytest.mark.parametrize("heads", [GaussianHeads(7, DIMS), Projectors(7, DIMS)])
def test_the_loss_is_that_of_the_heads_over_all_columns(heads, batch):
    features, labels = batch
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[1:3, 1] = False
    student, weight = Student(4, 7), torch.tensor([1.0, 3.0])
    loss = heads.alignment if isinstance(heads, Projectors) else heads
    norm = TeacherNorm(DIMS).eval()
    norm.estimate([(labels, mask)])
    columns = [student(each)["sentence_embedding"] for each in features]
    expected = [loss(x, norm(labels), mask=mask, weight=weight) for x in columns]
    found = DistillationLoss(student, heads, norm=norm, weight=weight)(features, labels)
    torch.testing.assert_close(found, sum(expected) / 2)
    found.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())


def test_options_go_to_the_loss(batch):
    (features, _), labels = batch, torch.randn(6, 8)
    student, heads = Student(4, 7), Projectors(7, DIMS)
    options = {"cosine": 1.0, "smooth_l1": 0.0}
    expected = heads.alignment(student(features[0])["sentence_embedding"], labels, **options)
    found = DistillationLoss(student, heads, **options)(features[:1], labels)
    torch.testing.assert_close(found, expected)


def test_mistakes_are_one_sentence(batch):
    features, labels = batch
    loss = DistillationLoss(Student(4, 7), Projectors(7, DIMS))
    with pytest.raises(ValueError, match=r"labels: expected the packed targets \(N, D\)"):
        loss(features, None)
    with pytest.raises(ValueError, match=r"labels: expected shape \(N, 8\), got \(6, 7\)"):
        loss(features, labels[:, 1:])
    with pytest.raises(TypeError, match=r"heads: expected GaussianHeads, .* got Ladder"):
        DistillationLoss(Student(4, 7), Ladder(7, DIMS, blocks=1))


@pytest.mark.filterwarnings("default")
def test_it_trains_in_the_trainer_itself(tmp_path):
    datasets = pytest.importorskip("datasets")
    package = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["the", "cat", "dog", "sees", "hears", "a", "small", "large", "house", "garden"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    texts = [" ".join(words[i] for i in torch.randint(10, (4,))) for _ in range(64)]
    counts = torch.tensor([[text.split().count(word) for word in words] for text in texts]).float()
    targets = torch.cat([counts @ torch.randn(10, 3), counts @ torch.randn(10, 5)], 1)
    targets[0, :3] = float("nan")
    data = datasets.Dataset.from_dict({"text": texts, "label": targets.tolist()})
    model = package.SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_dim=7)], device="cpu"
    )
    loss = DistillationLoss(model, Projectors(7, DIMS), norm=TeacherNorm(DIMS))
    heads = {key: value.clone() for key, value in loss.losses.heads.state_dict().items()}
    arguments = package.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=30,
        per_device_train_batch_size=16,
        learning_rate=3e-2,
        report_to="none",
        save_strategy="no",
        logging_steps=4,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = package.SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.2 * losses[0]
    trained = loss.losses.heads.state_dict()
    assert all(not torch.equal(trained[key], value) for key, value in heads.items())
    model.save(str(tmp_path / "student"))
    again = package.SentenceTransformer(str(tmp_path / "student"), device="cpu")
    assert (again.encode(texts[:3]) == model.encode(texts[:3])).all()
