"""`python -m gconv.info`: complete, valid JSON, and alive where something is missing."""

import json
import os
import subprocess
import sys

import pytest
import torch

import gconv
from gconv import backend, info

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(gconv.__file__)))


def run_info(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("GCONV_")}
    env["PYTHONPATH"] = os.pathsep.join([ROOT, env.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    env |= environment
    command = [sys.executable, "-m", "gconv.info", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=ROOT)
    return done.returncode, done.stdout, done.stderr


def test_json_has_what_a_bug_report_needs(ops):
    status, stdout, stderr = run_info("--json", GCONV_FALLBACK="silent", GCONV_ISA="portable")
    assert status == 0, stderr
    report = json.loads(stdout)
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["gconv"] == gconv.__version__ != "unknown"
    assert report["versions"]["python"] == sys.version.split()[0]
    assert report["cpu"]["model"] and report["cpu"]["threads"] >= 1
    assert report["cpu"]["isa in use"] == "portable" and "portable" in report["cpu"]["isa available"]
    assert report["backends"].pop("triton") and report["backends"].pop("cuda")
    assert report["backends"] == {
        "cpu": "available", "torch": "available", "mode": "auto", "fallback policy": "silent",
    }  # fmt: skip
    assert report["environment"]["GCONV_ISA"] == "portable" and report["environment"]["GCONV_BACKEND"] is None


def test_table_shows_every_value(capsys):
    assert info.main([]) == 0
    shown = capsys.readouterr().out
    for section, values in info.collect().items():
        assert f"\n{section}" in "\n" + shown
        for key in values:
            assert key in shown
    assert torch.__version__ in shown


def test_the_instruction_set_in_use_is_left_as_it_was(ops, isa):
    assert info.collect()["cpu"]["isa in use"] == isa
    assert ops.cpu_isa() == isa


def test_a_wrong_instruction_set_is_reported_and_not_fatal(ops):
    status, stdout, stderr = run_info("--json", GCONV_ISA="sse9")
    assert status == 0, stderr
    assert "sse9" in json.loads(stdout)["cpu"]["isa in use"]


def test_without_the_extension_the_cure_is_named(monkeypatch):
    monkeypatch.setattr(
        backend, "_missing_extension", "the extension gconv._C is not built: run `make develop`"
    )
    report = info.collect()
    assert "make develop" in report["backends"]["cpu"] and report["cpu"]["isa in use"] is None
    assert "make develop" in info.format_info(report)


def test_without_a_compiler_or_triton(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(info, "_installed", lambda package: None)
    report = info.collect()
    assert report["versions"]["compiler"] is None and report["versions"]["triton"] is None
    assert "-" in info.format_info(report)


def test_help_lists_the_environment_variables(capsys):
    with pytest.raises(SystemExit) as stop:
        info.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in info.VARIABLES)


def test_a_wrong_option_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        info.main(["--yaml"])
    assert stop.value.code == 2 and "--yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "told, want",
    [
        ("model name : AMD EPYC\ncpu family : 26\nmodel : 2\n", "AMD EPYC family 26 model 2"),
        ("cpu family : 6\nmodel : 143\nmodel name : Intel Xeon\n", "Intel Xeon family 6 model 143"),
        ("model name : AMD EPYC 9554\ncpu family : 25\nmodel : 17\n", "AMD EPYC 9554"),
        ("Hardware : Some Board\n", "Some Board"),
    ],
)  # fmt: skip
def test_a_cpu_without_a_number_gets_its_family(tmp_path, told, want):
    path = tmp_path / "cpuinfo"
    path.write_text(told + "\n" + told.replace("AMD", "another"))
    assert info._cpu_model(str(path)) == want


def test_where_no_cpu_is_told(tmp_path):
    assert info._cpu_model(str(tmp_path / "absent"))
