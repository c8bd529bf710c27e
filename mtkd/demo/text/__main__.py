"""`python -m mtkd.demo text`: distil six teachers of text into one small transformer."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from ...evaluation import evaluate
from ...evaluation.checks import Array
from ...packing import split
from ...teachers import TeacherStore, embed
from ...trainer import DistillationTrainer, Encoder
from ..report import TITLES, table, verdict
from ..students import LOSSES
from .corpus import Passage, graded_pairs, read_corpus
from .student import Settings, encode, make_student, make_trainer, train_or_resume
from .teachers import DIMS, FITTED, load_tokenizer, minilm_folder, revisions, transformer

PROBES = {
    "linear": "subjects by least squares, accuracy",
    "knn": "subjects by 10-NN, accuracy",
    "nmi": "subjects by k-means, NMI",
    "spearman": "graded pairs of passages, rank correlation",
    "r2": "mean R² of the (other) teachers",
    "overlap": "mean share of the (other) teachers' 10 nearest neighbours",
}


def main(arguments: list[str] | None = None) -> None:
    """Run the demonstration and write its results."""
    options = _parse(arguments)
    settings = replace(Settings(), epochs=options.epochs, seeds=options.seeds)
    if options.quick:
        settings = replace(settings, seeds=1, epochs=2, passages=40, subjects=6)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    start = time.perf_counter()
    try:
        demonstration = Demonstration(options.out, options.encoder, settings)
        demonstration.embed_teachers()
        demonstration.distil()
        demonstration.export()
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    print(demonstration.report(time.perf_counter() - start))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mtkd.demo text", description=__doc__)
    defaults = Settings()
    parser.add_argument("--seeds", type=int, default=defaults.seeds, help="default %(default)s")
    parser.add_argument("--epochs", type=int, default=defaults.epochs, help="default %(default)s")
    parser.add_argument("--out", type=Path, default=Path("demo-text"), help="default %(default)s")
    parser.add_argument("--encoder", type=Path, help="folder of another encoder than MiniLM")
    parser.add_argument("--quick", action="store_true", help="few texts and epochs: does it run?")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.epochs < 2:
        parser.error("expected --seeds of at least 1 and --epochs of at least 2")
    return options


class Demonstration:
    """The steps, in a folder: what is there already is not done again."""

    def __init__(self, out: Path, encoder: Path | None, settings: Settings) -> None:
        self.out, self.settings = out, settings
        _keep_settings(out / "settings.json", settings)
        self.folder = minilm_folder() if encoder is None else encoder
        self.encoder = "MiniLM" if encoder is None else encoder.name
        self.tokenizer = load_tokenizer(self.folder)
        self.passages: list[Passage] = read_corpus(settings.passages, settings.subjects)
        self.texts = [passage.text for passage in self.passages]
        self.held_out = np.array([passage.held_out for passage in self.passages])
        self.known = [passage for passage in self.passages if not passage.held_out]
        self.revisions = revisions(self.encoder, self.folder, self.known)
        self.store = self._open_store(out / "teachers")
        self.scores: dict[str, dict[str, list[float]]] = {}
        self.trainer: DistillationTrainer | None = None

    def _open_store(self, path: Path) -> TeacherStore:
        """Make the store, or open it if the same teachers have begun to fill it."""
        try:
            return TeacherStore.create(
                path,
                {self.encoder: self._width(), **DIMS},
                rows=len(self.texts),
                revision=self.revisions,
                ids=self.texts,
                exist_ok=True,
            )
        except ValueError as error:
            expected = "a new folder or one of the same texts, teachers and libraries"
            raise ValueError(f"--out: expected {expected}: {error}") from None

    def embed_teachers(self) -> None:
        """Fit the teachers on the training passages; store what they say of every passage."""
        subjects = len({passage.subject for passage in self.passages})
        held = int(self.held_out.sum())
        print(f"{len(self.texts)} passages about {subjects} subjects, {held} of them held out")
        order = np.argsort([len(text) for text in self.texts], kind="stable")
        for name in self.store.names:
            if bool(self.store.present(name).all()):
                continue  # filled by an earlier run
            torch.manual_seed(0)
            teacher = (
                transformer(self.folder) if name == self.encoder else FITTED[name](self.known, 0)
            )
            # texts of like length together: less padding
            embed(
                teacher.model,
                [self.texts[row] for row in order],
                self.store,
                name,
                rows=order,
                collate_fn=teacher.collate,
                revision=self.revisions[name],
            )
        packed, _ = self.store[:]
        parts = split(packed, tuple(self.store.dims.values()))
        for name, part in zip(self.store.names, parts, strict=True):
            self._score(name, part.numpy())

    def distil(self) -> None:
        """Distil a student a loss and seed; the first is stopped halfway and resumed."""
        for seed in range(self.settings.seeds):
            student = make_student(self.tokenizer, self.settings, seed)
            self._score("untrained", encode(student, self.tokenizer, self.texts))
            for loss in LOSSES:
                trainer = self._train(loss, seed)
                if self.trainer is None:
                    self.trainer = trainer
                self._score(loss, encode(trainer.student, self.tokenizer, self.texts))

    def _train(self, loss: str, seed: int) -> DistillationTrainer:
        rows = np.flatnonzero(~self.held_out)
        folder = self.out / f"{loss}-{seed}"

        def fresh() -> DistillationTrainer:
            return make_trainer(
                loss, self.texts, rows, self.store, self.tokenizer, folder, self.settings, seed
            )

        if loss == LOSSES[0] and seed == 0 and not folder.exists():
            halfway = self.settings.epochs // 2 * -(-len(rows) // self.settings.batch) - 1
            step = train_or_resume(fresh(), stop=halfway)
            print(f"stopped after step {step}; a new trainer goes on from its checkpoint")
        trainer = fresh()
        train_or_resume(trainer)
        if loss == LOSSES[0]:
            logs = [log for log in trainer.state.log_history if "loss" in log][-1]
            told = {k.split("/")[1]: v for k, v in logs.items() if k.startswith("information/")}
            told_text = ", ".join(f"{name} {nats:.2f}" for name, nats in told.items())
            print(f"nats per dimension that the student tells of its teachers: {told_text}")
        return trainer

    def export(self) -> None:
        """Export the first Gaussian student; check that what others load is what was trained."""
        assert self.trainer is not None
        path = str(self.out / "student")
        self.trainer.export_student(path)
        model = AutoModel.from_pretrained(path, add_pooling_layer=False)
        student = Encoder(model, pooling="mean")
        tokenizer = AutoTokenizer.from_pretrained(path)
        texts = [t for t, held in zip(self.texts, self.held_out, strict=True) if held][:64]
        there = encode(student, tokenizer, texts)
        here = encode(self.trainer.student, self.tokenizer, texts)
        print(f"the exported student, loaded again, differs by {np.abs(there - here).max():.1e}")

    def _score(self, name: str, embeddings: Array) -> None:
        """Add the scores of an embedding of all passages."""
        targets, mask = self.store[:]
        names = [passage.subject for passage in self.passages]
        found = evaluate(
            embeddings,
            labels=names,
            pairs=self._pairs(),
            teachers=targets,
            dims=self.store.dims,
            mask=mask,
            held_out=self.held_out,
            only=tuple(PROBES),
        )
        for kind in ("r2", "overlap"):
            others = [found[f"{kind}/{each}"] for each in self.store.names if each != name]
            found[kind] = float(np.mean(others))
        for key in PROBES:
            self.scores.setdefault(name, {}).setdefault(key, []).append(found[key])

    def _pairs(self) -> tuple[Array, Array, Array]:
        """Graded pairs of held-out passages, as rows of all."""
        rows = np.flatnonzero(self.held_out)
        first, second, grades = graded_pairs([self.passages[row] for row in rows])
        return rows[first], rows[second], grades

    def _width(self) -> int:
        config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return int(config["hidden_size"])

    def report(self, seconds: float) -> str:
        """Write results.json; return the table and what it says."""
        names = [*self.store.names, *TITLES]
        scores = {n: {k: np.array(v) for k, v in self.scores[n].items()} for n in names}
        words = verdict(scores, PROBES)
        content: dict[str, Any] = {
            "settings": asdict(self.settings),
            "probes": PROBES,
            "teacher_widths": self.store.dims,
            "scores": self.scores,
            "verdict": words,
            "seconds": round(seconds, 1),
        }
        path = self.out / "results.json"
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        shown = table(scores, self.store.dims, self.settings.width, PROBES)
        return f"\n{shown}\n\n{words}\n\n{seconds:.0f} s; the student is in {self.out / 'student'}"


def _keep_settings(path: Path, settings: Settings) -> None:
    """Write what a folder was made with; refuse to go on in it with anything else but seeds."""
    ours = {key: value for key, value in asdict(settings).items() if key != "seeds"}
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        if theirs != ours:
            raise ValueError(f"--out: expected a new folder or one made with {ours}, got {theirs}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ours) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
