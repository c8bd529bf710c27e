"""What importing brings, and life without the compiled extension."""

import os
import subprocess
import sys


def _run(code, **environment):
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_brings_no_surprises():
    loaded = _run(
        "import sys, torch; before = set(sys.modules); import mtkd.functional;"
        "print(sorted(m for m in set(sys.modules) - before if 'triton' in m or 'distributed' in m))"
    )
    assert loaded == "[]"


def test_rooms_are_there_when_they_are_named():
    code = "import mtkd; print(mtkd.functional.mse.__name__, hasattr(mtkd, 'nosuch'))"
    assert _run(code) == "mse False"


def test_works_without_the_extension():
    code = (
        "import torch, mtkd.ops, mtkd.functional as F; assert mtkd.ops.extension is None;"
        "x = torch.ones(2, 3, requires_grad=True); F.gaussian_nll(x, x, x.detach()).backward();"
        "w = torch.ones(2, 3, 3, requires_grad=True);"
        "F.linear_gaussian_nll(x, w, x.detach()).backward(); print(bool(w.grad.isfinite().all()))"
    )
    assert _run(code, MTKD_NO_EXTENSION="1") == "True"
