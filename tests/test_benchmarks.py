"""The benchmark: no speed for what is wrong, nothing lost, pages from files, a dry run on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mtkd.functional as F
from benchmarks import __main__ as main
from benchmarks import check, docs, machine, plots, results
from benchmarks import run as benchmark
from benchmarks.cases import CASES, ROWS
from mtkd import ops

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"


def run(monkeypatch, *words):
    """Run the command in this process; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    return main.main()


def dry(monkeypatch, out, *words):
    """Run cases in this process as a dry run does; return the exit code and what was stored."""
    code = run(monkeypatch, "--dry-run", "--regime", "gpu", "--out", str(out), *words)
    return code, json.loads((out / "dry-run.json").read_text())["gpu"]


def formulas(role):
    """The formulas under the names of an implementation's kernels."""
    if role == check.SCALE:
        return lambda tensors, scale: [x.mul_(scale) for x in tensors]
    return getattr(ops.gaussian_nll.formulas, role)


# A case is timed if and only if it is right


def test_a_right_case_has_a_speed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check, "implementations", lambda loss, device: {"triton": formulas})
    code, stored = dry(monkeypatch, tmp_path, ROWS, "--only", "4 x (1 x 8)")
    (result,) = stored.values()
    assert code == 0
    assert result["milliseconds"].keys() == {"ours", "eager", "loop"}
    assert result["implementations"].keys() == set(check.ROLES)
    assert result["of_allowed_by_implementation"]["triton"] <= 1
    assert result["host_microseconds"]["forward"] > 0
    assert result["first_call_milliseconds"]["ours"] > 0
    assert "NOT reached" not in capsys.readouterr().out  # nothing is asked of a dry run


@pytest.mark.parametrize("loss", ["gaussian_nll", "linear_gaussian_nll"])
def test_a_wrong_loss_has_no_speed(monkeypatch, tmp_path, capsys, loss):
    right = getattr(F, loss)
    monkeypatch.setattr(F, loss, lambda *args, **more: 1.01 * right(*args, **more))
    code, stored = dry(monkeypatch, tmp_path, loss, "--only", "4 x (1 x 8)")
    (result,) = stored.values()
    assert code == 1
    assert "ours" in result["failed"]
    assert "milliseconds" not in result
    assert "FAILED, no speed" in capsys.readouterr().out


@pytest.mark.parametrize("role", check.ROLES)
def test_a_wrong_kernel_called_by_name_has_no_speed(monkeypatch, tmp_path, role):
    def wrong(asked):
        right = formulas(asked)

        def kernel(*args):
            made = right(*args)
            outputs = {"value_and_grad_out": args[-3:-1], check.SCALE: args[0]}.get(asked, made)
            for x in outputs if asked == role else ():
                x.detach().add_(1)
            return made

        return kernel

    monkeypatch.setattr(
        check, "implementations", lambda loss, device: {"triton": formulas, "compiled": wrong}
    )
    code, stored = dry(monkeypatch, tmp_path, ROWS, "--only", "8192 x (8 x 1024)")
    assert code == 1
    for result in stored.values():
        assert "compiled" in result["failed"]
        assert "triton" not in result["failed"]
        assert "milliseconds" not in result


def test_a_baseline_that_fails_is_left_out(monkeypatch, tmp_path):
    def broken(self):
        raise OSError("no compiler")

    monkeypatch.setattr("benchmarks.gaussian.Rows.loop", broken)
    code, stored = dry(monkeypatch, tmp_path, ROWS, "--only", "4 x (1 x 8)")
    (result,) = stored.values()
    assert code == 0
    assert "no compiler" in result["skipped"]["loop"]
    assert result["milliseconds"].keys() == {"ours", "eager"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_names_of_cases_differ(device):
    names = [case.name for case in CASES[device]]
    assert len(set(names)) == len(names)


def test_a_name_without_a_case_is_told(monkeypatch, capsys, tmp_path):
    assert run(monkeypatch, "--only", "nosuch", "--out", str(tmp_path)) == 2
    assert "--only: expected part of a name in --list, got 'nosuch'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_check_compares_every_kind_of_case(monkeypatch, capsys):
    assert run(monkeypatch, "--check", "--device", "cpu", "--only", "32 x") == 0
    assert "a sequence: error" in capsys.readouterr().out


# Nothing is lost


def test_an_interrupted_run_goes_on(monkeypatch, tmp_path):
    names = [case.name for case in CASES["cuda"] if case.name.startswith("gaussian_nll 2048 x")]
    ran = []

    def stopped_at_the_second(bench, *_):
        ran.append(bench.case)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return {"milliseconds": {}} if len(ran) == 1 else {"failed": "wrong"}

    monkeypatch.setattr(benchmark, "run", stopped_at_the_second)
    monkeypatch.setattr(main, "_lines", lambda case, *_: [case.name])
    with pytest.raises(KeyboardInterrupt):
        dry(monkeypatch, tmp_path, ROWS, "--only", "2048 x")
    stored = json.loads((tmp_path / "dry-run.json").read_text())["gpu"]
    assert stored.keys() == set(names[:2])
    assert stored[names[1]] == {"failed": results.UNFINISHED}
    code, stored = dry(monkeypatch, tmp_path, ROWS, "--only", "2048 x")
    assert code == 1
    assert len(ran) == len(names) + 1  # all but the first again
    assert "failed" not in stored[names[0]]
    assert stored.keys() == set(names)
    assert ran[-1] == ran[1]  # what never ended comes last


def test_a_file_is_whole_at_any_moment(monkeypatch, tmp_path):
    store = results.Store(tmp_path / "a.json", {"kind": "cpu"})
    store.add("cold", "one", {"milliseconds": 1})
    before = store.path.read_text()

    def full(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="full"):
            store.add("cold", "two", {"milliseconds": 2})
    assert store.path.read_text() == before
    store.add("cold", "two", {"failed": "wrong"})
    store.begin("cold", "one")
    assert store.read()["cold"]["one"] == {"milliseconds": 1}
    assert (store.done("cold", "one"), store.done("cold", "two")) == (True, False)
    assert (store.tried("cold", "two"), store.tried("cold", "three")) == (True, False)


def test_after_a_process_that_died_another_one_goes_on(monkeypatch, tmp_path):
    codes, commands = [-11, main.DIED, 0], []

    def fake(command, env):
        commands.append(command)
        return subprocess.CompletedProcess(command, codes[len(commands) - 1])

    monkeypatch.setattr(subprocess, "run", fake)
    assert run(monkeypatch, "--dry-run", "--out", str(tmp_path)) == 1
    assert ["--untried" in command for command in commands] == [False, True, True]


# Pages and plots are made of files


def test_the_page_is_made_of_committed_results():
    files = results.committed()
    assert docs.PAGE.read_text() == docs.text(files)
    for _, data in files:
        for figure in plots.figures(data):
            assert (plots.FIGURES / figure).exists()


def test_the_page_says_what_has_not_run_on_a_gpu():
    cpu = [(name, data) for name, data in results.committed() if data["machine"]["kind"] == "cpu"]
    assert docs.NOT_RUN in docs.text(cpu)
    assert docs.NOT_RUN not in docs.text([("gpu.json", gpu_results())])


def gpu_results():
    """Results as a GPU would give them: a failed case, and one with all there is."""
    good = {
        "milliseconds": {"ours": 1.0, "loop": 3.0, "compile": 1.2},
        "first_call_milliseconds": {"ours": 900.0},
        "implementations": {"forward": {"triton": 0.5, "compiled": 0.25}},
        "host_microseconds": {"forward": 20.0, "forward + backward": 70.0},
        "memory_mib": {"ours": 300.0, "loop": None},
        "floor_milliseconds": 0.9,
        "share_of_floor": 0.9,
        "gradient_mib": 256.0,
        "gradient_error": 1e-3,
        "of_allowed": 0.6,
    }
    gpu = {"gpu": "Some Card", "multiprocessors": 1, "gpu_memory_gib": 2, "l2_mib": 3}
    versions = {"capability": "9.0", "torch": "2.13", "cuda": "13.0", "triton": "3.7"}
    return {
        "date": "2026-01-01",
        "machine": {"kind": "cuda", **gpu, **versions},
        "ceilings": {"gpu": {"copy_gbs": 4000.0, "gemm_gflops": 7e5, "load": 0.0}},
        "gpu": {
            "gaussian_nll 8192 x (8 x 1024)": good,
            "gaussian_nll 4 x (1 x 8)": {"failed": "error over what is allowed: triton 3"},
        },
    }


def test_the_page_shows_what_a_gpu_gave():
    page = docs.text([("gpu.json", gpu_results())])
    rows = [
        line for line in page.splitlines() if line.startswith("| gaussian_nll 8192 x (8 x 1024)")
    ]
    assert any("at least 85.0 % | 90.0 %" in row for row in rows)
    assert any("at least 1.3 x | **1.2 x**" in row for row in rows)  # not as asked: bold
    assert any("| forward | 0.5000 | 0.2500 |" in row for row in rows)
    assert "at worst 1.2 x" in page
    assert "**check failed**" in page
    assert "no speed, since its check failed: error over what is allowed: triton 3" in page
    assert "H=4096 | gpu | extra memory | at most 256 MiB | not measured" in page


def test_machines_are_named_by_their_hardware():
    assert machine.slug(gpu_results()["machine"]) == "some-card"
    assert os.uname().nodename not in json.dumps(machine.describe("cpu", 2)).split('"')


# Everything on a GPU, walked through without one


def on_gpu(out, *words, python=sys.executable):
    """Run the script; tools beside that Python are found first."""
    path = f"{Path(python).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPT), str(out), *words],
        env=os.environ | {"PYTHON": str(python), "PATH": path},
        capture_output=True,
        text=True,
    )


def test_a_dry_run_walks_every_step(tmp_path):
    done = on_gpu(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("build", "kernels", "memcheck", "racecheck"):
        assert f"== {part}: would run: " in done.stdout
    data = json.loads((tmp_path / "dry-run.json").read_text())
    assert data["gpu"].keys() == {case.name for case in CASES["cuda"]}
    assert [result for result in data["gpu"].values() if "failed" in result] == []
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"dry-run.json", "done-dry-run", "log.txt", *plots.figures(data)}
    assert results.committed(tmp_path) == []  # its numbers reach no page


@pytest.fixture
def pretended_python(tmp_path):
    """A Python that does nothing, and fails to report while the file `broken` is there."""
    script, broken = tmp_path / "python", tmp_path / "broken"
    script.write_text(f'#!/bin/sh\ncase "$*" in "-m mtkd") test ! -e {broken} || exit 7;; esac\n')
    sanitizer = tmp_path / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\necho "compute-sanitizer $*"\n')
    for tool in (script, sanitizer):
        tool.chmod(0o755)
    broken.touch()
    return script, broken


def test_on_a_gpu_the_parts_come_in_order(tmp_path, pretended_python):
    python, broken = pretended_python
    broken.unlink()
    out = tmp_path / "out"
    done = on_gpu(out, python=python)
    assert done.returncode == 0, done.stdout + done.stderr
    started = [line.split(":")[0] for line in done.stdout.splitlines() if ": at most" in line]
    parts = ["report", "tests", "memcheck", "racecheck", "benchmark"]
    assert started == [f"== {name}" for name in ("build", "kernels", *parts)]
    assert (out / "done").read_text().split() == parts
    assert f"--tool racecheck {python} -m benchmarks --device cuda --check" in done.stdout
    assert {path.name for path in out.iterdir()} == {"done", "log.txt"}


def test_a_part_that_fails_stops_no_other_and_is_done_again(tmp_path, pretended_python):
    (python, broken), out = pretended_python, tmp_path / "out"
    first = on_gpu(out, "--dry-run", python=python)
    assert first.returncode == 1
    assert "report: exit code 7" in first.stdout
    assert "benchmark: exit code 0" in first.stdout
    assert first.stdout.splitlines()[-1].endswith(" report;")
    broken.unlink()
    second = on_gpu(out, "--dry-run", python=python)
    assert second.returncode == 0
    assert "report: exit code 0" in second.stdout
    for part in ("tests", "benchmark"):
        assert f"== {part}: done before" in second.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = on_gpu(tmp_path)
    assert done.returncode == 1
    assert "sees no GPU" in done.stdout


@pytest.mark.parametrize("words", [[], ["a", "b"], ["a", "--fast"]])
def test_wrong_words_show_the_usage(words):
    done = subprocess.run(["bash", str(SCRIPT), *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage:" in done.stderr
