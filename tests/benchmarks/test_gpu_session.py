"""The script of a GPU session, at a tiny size on the CPU."""

import importlib
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
SLUG = "self-forcing-tiny-random"

pytestmark = pytest.mark.slow


@pytest.fixture
def script(monkeypatch):
    """Import a script by name, as running it by path would, and forget it afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in [path.stem for path in FOLDER.glob("*.py")]:
        sys.modules.pop(name, None)


def start(
    tmp_path: Path, sections: str, run: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    given = {"DRY_RUN": "1", "SECTIONS": sections, "COMMIT": "0" * 40, "PYTHON": sys.executable}
    given |= {"RESULTS": str(tmp_path / "results"), "OUT": str(tmp_path / "out")}
    return subprocess.run(
        ["bash", str(FOLDER / "gpu_session.sh"), *run.split()],
        env={**os.environ, **given, **variables},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_headline_compares_variants_and_another_checkout(tmp_path):
    names = "default; reference; fp8_gemm; triton; graphs off"
    reference = {"REFERENCE": str(ROOT), "REFERENCE_COMMIT": "1" * 40}
    done = start(tmp_path, "headline", HEADLINE=names, **reference)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "results/headline.json").read_text())
    rows = {row["variant"]: row for row in report["rows"]}
    assert {"default", "reference", "fp8_gemm", "graphs off"} <= set(rows)
    assert rows["reference"]["commit"] == "1" * 40 != rows["default"]["commit"]
    for name in ("reference", "graphs off"):
        assert rows[name]["latent_error_last"] == 0, "float32 on a CPU: the same bits"
        assert rows[name]["output_sha256"] == rows["default"]["output_sha256"]
    assert "needs a CUDA device" in report["not_measured"]["triton"]
    table = (tmp_path / "out/summary.md").read_text()
    assert f"| headline | {SLUG} | default |" in table
    assert "- lingbot: not asked for, 0 s (not measured)" in table
    assert "one AR step" in (tmp_path / "out/profile_headline.txt").read_text()
    with tarfile.open(tmp_path / "out/session.tar.gz") as pack:
        assert {"./headline.json", "./headline.log"} <= set(pack.getnames())


def test_what_has_no_time_left_is_not_measured(tmp_path):
    done = start(tmp_path, "tiles kernels", TOTAL_S="9")
    assert done.returncode == 1
    assert "- tiles: not measured: no time was left, 0 s" in done.stdout
    assert not list((tmp_path / "results").glob("*.json"))


@pytest.mark.parametrize(("total_s", "seconds"), [("999", "125"), ("60", "50")])
def test_variants_are_timed_within_what_is_left(tmp_path, total_s, seconds):
    done = start(tmp_path, "headline", TOTAL_S=total_s, PYTHON="echo")
    assert f"--seconds {seconds} " in done.stdout


def test_the_two_runs_have_all_sections_between_them(tmp_path):
    found = {}
    for run in ("decide", "check", ""):
        assert start(tmp_path, "", run, TOTAL_S="9", PYTHON="true").returncode == 1
        lines = (tmp_path / "results/sections.tsv").read_text().splitlines()
        found[run] = [line.split("\t")[0] for line in lines if "no time was left" in line]
    assert found["decide"] and found["check"] and found["decide"] + found["check"] == found[""]


@pytest.mark.parametrize(
    ("sections", "run", "message"),
    [("headlines", "", "unknown section headlines"), ("", "decides", "unknown run decides")],
)
def test_an_unknown_section_or_run_is_refused(tmp_path, sections, run, message):
    done = start(tmp_path, sections, run)
    assert done.returncode == 2 and message in done.stderr


def test_a_section_that_fails_is_named_and_the_others_run(tmp_path):
    done = start(tmp_path, "kernels", PYTHON="false")
    assert "failed" in (tmp_path / "results/sections.tsv").read_text()
    assert done.returncode != 0


def test_a_variant_that_cannot_run_is_named(script, tmp_path, capsys):
    path = tmp_path / "variants.json"
    words = [SLUG, "--variants", "default; triton", "--repeats", "1", "--steps", "1"]
    words += ["--one-at-a-time", "--device", "cpu", "--git-commit", "0" * 40]
    script("variants").main([*words, "--json", str(path)])
    report = json.loads(path.read_text())
    assert [row["variant"] for row in report["rows"]] == ["default"]
    assert "triton" in report["not_measured"]
    assert "not measured: triton:" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script("variants").main([SLUG, "--variants", "faster"])


def test_a_variant_that_is_late_keeps_what_it_has(script, tmp_path, monkeypatch):
    variants, path = script("variants"), tmp_path / "variants.json"
    take_turn, turns = variants.Run._take_turn, []

    def late(run, variant):
        turns.append(variant.name)
        if len(turns) == 3:
            raise variants.NotMeasuredError("the time limit")
        take_turn(run, variant)

    monkeypatch.setattr(variants.Run, "_take_turn", late)
    words = [SLUG, "--variants", "default; graphs off", "--repeats", "2", "--steps", "1"]
    variants.main([*words, "--device", "cpu", "--git-commit", "0" * 40, "--json", str(path)])
    assert turns == ["default", "graphs off", "graphs off", "default"]
    rows = {row["variant"]: row for row in json.loads(path.read_text())["rows"]}
    assert (rows["default"]["repeats"], rows["graphs off"]["repeats"]) == (2, 1)
    assert rows["graphs off"]["latency_p50_ms"] == "not measured"


def test_a_kernel_that_fails_is_left_out_with_the_reason(script, capsys):
    kernels, once = script("kernels"), iter([torch.ones(2)])
    call = lambda: next(once)  # noqa: E731
    assert kernels.measure(kernels.Case("k", call, call, 1), torch.device("cpu"), 1, False) == []
    assert "k, unfused: cannot be used here" in capsys.readouterr().err
    case = kernels.Case("k", lambda: torch.ones(2), call, 1)
    (row,) = kernels.measure(case, torch.device("cpu"), 1, False)
    assert (row["variant"], row["error"]) == ("unfused", 0)


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("void cutlass::device_kernel<flash::FlashAttnFwdSm90<flash::Mainloop<2> > >(x)",
         "FlashAttention-3"),
        ("void cutlass::device_kernel<flash::FlashAttnFwdCombine<cute::tuple<cute::C<8> > > >(x)",
         "FlashAttention-3, merge of KV splits"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwc_tilesize256x64x32_warpgroup_x",
         "cuDNN convolution, sm90, tilesize256x64x32"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<float>, "
         "std::array<char*, 3ul> >(int)", "CUDAFunctor_add<float>"),
        ("norm_rope", "norm_rope"),
    ],
)  # fmt: skip
def test_a_profile_has_short_names(script, symbol, name):
    assert script("variants").kernel_name(symbol) == name


def test_the_session_table_counts_tests(script):
    log = "tests/a.py::b PASSED [1%]\ntests/a.py::c[x y] FAILED [2%]\nnothing\n"
    log += "[gw1] [ 99%] PASSED tests/d.py::e \nFAILED tests/a.py::c[x y] - assert False\n"
    found = script("session_table").tests_of(log)
    assert found == {
        "passed": ["tests/a.py::b", "tests/d.py::e"],
        "failed": ["tests/a.py::c[x y]"],
    }


def test_cheap_weights_have_the_moments_of_the_initialisers(script):
    cheap_weights = script("cheap_weights").cheap_weights

    def build() -> list[torch.Tensor]:
        layers = torch.nn.Linear(512, 700), torch.nn.Conv2d(32, 64, 3), torch.nn.Embedding(90, 99)
        return [x.detach() for layer in layers for x in layer.parameters()]

    torch.manual_seed(0)
    drawn = build()
    with cheap_weights(torch.device("cpu")):
        cheap, again = build(), build()
        drawn_by_a_generator = torch.randn(3, generator=torch.Generator().manual_seed(1))
    for a, b, c in zip(cheap, drawn, again, strict=True):
        assert torch.equal(a, c), "the same values whatever was built before"
        assert float(a.std()) == pytest.approx(float(b.std()), rel=0.2)
        assert abs(a.mean()) < 0.2 * a.std()
    assert torch.equal(
        drawn_by_a_generator, torch.randn(3, generator=torch.Generator().manual_seed(1))
    )
    assert not torch.equal(build()[0], cheap[0]), "afterwards they are drawn again"
