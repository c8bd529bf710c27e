"""``python -m mtkd`` tells the truth about this installation."""

import os
import subprocess
import sys

import pytest
import torch

from mtkd import __main__ as main
from mtkd import ops

EXTENSION = ops.extension is not None


def run(**environment):
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "mtkd"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stderr == ""
    return result.stdout


def test_report_names_versions_devices_and_every_loss():
    out = run()
    assert f"torch   {torch.__version__}" in out
    assert "CPU" in out
    for name in ops.NAMES:
        assert f"\n{name} " in out
    assert ("extension is loaded" in out) == EXTENSION


def test_without_the_extension_it_says_how_to_get_it():
    out = run(MTKD_NO_EXTENSION="1")
    assert "extension is not loaded" in out
    assert "pip install" in out
    assert "gaussian_nll         formula" in out
    assert "driver over formula" in out
    assert "compiled\n" not in out


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_implementation_is_what_the_dispatcher_holds(device):
    for name in ops.NAMES:
        named = main.implementation(name, device)
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"mtkd::{name}", device.upper())
        assert (named == "formula") != registered
        assert named.startswith("driver over ") == name.startswith("linear_")


def test_the_compiled_kernel_is_named_where_it_is_loaded():
    assert main.implementation("gaussian_nll", "cpu") == ("compiled" if EXTENSION else "formula")


def test_a_device_without_kernels_uses_the_formula():
    assert main.implementation("gaussian_nll", "meta") == "formula"
    assert main.implementation("linear_gaussian_nll", "meta") == "formula"


def test_table_aligns():
    assert main.table([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc  d"
