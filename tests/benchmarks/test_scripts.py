"""Every benchmark runs at a tiny size, and its report says all that it must."""

import copy
import importlib
import json
import os
import runpy
import sys
import time
from pathlib import Path

import pytest
import torch

from flashdreams.models.video_decoder import VideoDecoder
from tests.harness import run_like_torchrun

FOLDER = Path(__file__).parents[2] / "benchmarks"
COMMIT = ["--git-commit", "0" * 40, "--device", "cpu"]

pytestmark = pytest.mark.slow


@pytest.fixture
def script(monkeypatch):
    """Import a script by name, as running it by path would, and forget it afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)
    for name in [path.stem for path in FOLDER.glob("*.py")]:
        sys.modules.pop(name, None)


def read_report(path: Path) -> dict:
    found = json.loads(path.read_text())
    assert found["git_commit"] == "0" * 40 and len(found["config_sha256"]) == 64
    assert found["device"]["name"] and found["versions"]["torch"] and found["date"]
    assert all(len(row["output_sha256"]) == 64 for row in found["rows"])
    return found


@pytest.mark.parametrize(
    ("slug", "frames"),
    [("toy-world", 1), ("self-forcing-tiny-random", 12), ("wan21-i2v-tiny-random", None)],
)
def test_fps(script, tmp_path, slug, frames):
    path = tmp_path / "fps.json"
    script("fps").main([slug, "--repeats", "2", "--json", str(path), *COMMIT])
    (row,) = read_report(path)["rows"]
    assert row["frames_per_step"] == frames or frames is None
    assert row["fps"] == pytest.approx(1e3 * row["frames_per_step"] / row["p50_ms"])
    assert 0 < row["tflops"] < row["matmul_tflops"] * 1.5
    assert row["latency_p50_ms"] <= row["p99_ms"] and row["peak_gib"] > 0


def test_fps_with_a_named_backend_gives_the_same_frames(script, tmp_path):
    rows = []
    for backend in ("sdpa", "sdpa_flash"):
        path = tmp_path / f"{backend}.json"
        words = ["self-forcing-tiny-random", "--repeats", "1", "--backend", backend]
        script("fps").main([*words, "--json", str(path), *COMMIT])
        rows += read_report(path)["rows"]
    assert rows[0]["output_sha256"] == rows[1]["output_sha256"]
    with pytest.raises(ValueError, match="cannot be used here"):
        script("fps").main(["toy-world", "--backend", "sdpa_cudnn", *COMMIT])


def test_fps_steers_a_camera(script, tmp_path):
    path = tmp_path / "fps.json"
    script("fps").main(
        ["lingbot-world-tiny-random", "--repeats", "1", "--json", str(path), *COMMIT]
    )
    assert read_report(path)["rows"][0]["weights"] == "as configured"


@pytest.mark.parametrize(("name", "repeats"), [("fps", 1), ("growth", 15), ("overhead", 1)])
def test_streaming_methods_under_torchrun(tmp_path, name, repeats):
    path = tmp_path / "report.json"
    words = [FOLDER / f"{name}.py", "self-forcing-tiny-random", "--repeats", repeats]
    words = [*map(str, words), "--json", str(path), *COMMIT]
    assert run_like_torchrun(2, run_script, words) == 0
    assert "ulysses 2" in read_report(path)["config"]["parallel"]


def run_script(words):
    """As Python runs a script by its path."""
    sys.argv = words
    sys.path.insert(0, str(FOLDER))
    runpy.run_path(words[0], run_name="__main__")


def test_weights_that_are_not_here_are_drawn(script):
    from flashdreams.integrations.self_forcing.config import PIPELINE

    config, missing = script("rollout").without_missing_weights(PIPELINE)
    assert config.text_encoder is None and config.decoder.checkpoint is None
    assert config.diffusion_model.transformer.checkpoint is None
    assert "diffusion_model.transformer" in missing


def test_serving(script, tmp_path):
    path = tmp_path / "serving.json"
    words = ["toy-world", "--steps", "10", "--repeats", "1", "--sessions", "1", "2"]
    script("serving").main([*words, "--seconds", "2", "--json", str(path), *COMMIT])
    rows = read_report(path)["rows"]
    assert [row["variant"] for row in rows] == [
        *("bare loop", "served", "key to photon", "jitter", "key to photon", "jitter")
    ]
    bare, served, *live = rows
    assert bare["output_sha256"] == served["output_sha256"] and served["bar_ms"] == 2.0
    assert served["cost_ms"] == pytest.approx(served["p50_ms"] - bare["p50_ms"])
    assert all(row["repeats"] > 0 and row["fps"] > 0 for row in live)


@pytest.mark.parametrize("slug", ["self-forcing-tiny-random", "causal-forcing-tiny-random"])
def test_overhead(script, tmp_path, slug):
    path = tmp_path / "overhead.json"
    words = [slug, "--repeats", "2", "--json", str(path)]
    script("overhead").main([*words, *COMMIT])
    engine, bare = read_report(path)["rows"]
    assert engine["variant"] == "engine" and bare["ratio"] == 1.0
    assert engine["max_difference"] < 1e-3 and engine["bar"] == 1.05


def test_overhead_refuses_a_loop_that_does_other_work(script, monkeypatch):
    overhead = script("overhead")

    class OtherNoise(overhead.NoiseSource):
        def __init__(self, seed):
            super().__init__(seed + 1)

    monkeypatch.setattr(overhead, "NoiseSource", OtherNoise)
    with pytest.raises(RuntimeError, match="bare loop: the outputs differ"):
        overhead.main(["self-forcing-tiny-random", "--repeats", "1", *COMMIT])


def test_snapshots(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "snapshots.json"
    words = ["self-forcing-tiny-random", "--repeats", "1", "--window", "9", "--json", str(path)]
    script("snapshots").main([*words, *COMMIT])
    rows = {row["variant"]: row for row in read_report(path)["rows"]}
    assert rows["save"]["bytes"] > rows["save, light"]["bytes"] > 0
    assert rows["copy"]["ratio"] == rows["step in turn"]["ratio"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["snapshots.json"]


def test_growth(script, tmp_path):
    path, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    words = ["--repeats", "20", "--json", str(path), "--plot", str(picture)]
    script("growth").main([*words, *COMMIT])
    (row,) = read_report(path)["rows"]
    assert len(row["times_ms"]) == len(row["memory_mib"]) == 20
    assert picture.stat().st_size > 1000
    with pytest.raises(ValueError, match="needs more than"):
        script("growth").main(["--repeats", "3", *COMMIT])


def test_growth_notices_a_rollout_that_slows_with_age(script, tmp_path, monkeypatch):
    growth, path = script("growth"), tmp_path / "growth.json"
    step = growth.rollout.Subject.step

    def slower_every_time(subject, cache):
        """A tenth of a step more with every step, whatever a step takes on this machine."""
        age, begin = cache.next_index, time.thread_time()
        chunk = step(subject, cache)
        end = time.thread_time()
        while time.thread_time() < end + 0.1 * age * (end - begin):
            pass
        return chunk

    monkeypatch.setattr(growth.rollout.Subject, "step", slower_every_time)
    growth.main(["--repeats", "20", "--json", str(path), *COMMIT])
    (row,) = read_report(path)["rows"]
    assert row["paired_ratio"] > row["bar"] and not row["within_bar"]


def test_precision(script, tmp_path):
    path = tmp_path / "precision.json"
    words = ["self-forcing-tiny-random", "--repeats", "2", "--steps", "6", "--variants"]
    words += ["fp8", "KV int8"]
    script("precision").main([*words, "--json", str(path), *COMMIT])
    exact, fp8, int8, *golden = read_report(path)["rows"]
    assert exact["latent_error_max"] == 0 and exact["ratio"] == 1
    assert 0 < int8["latent_error_max"] < fp8["latent_error_max"] < 0.1
    assert int8["kv_cache_mib"] < exact["kv_cache_mib"] / 3
    assert fp8["kv_cache_mib"] == exact["kv_cache_mib"] / 4
    assert exact["latent_error_last"] == 0 < fp8["latent_error_first"] < 0.1
    goldens = 3 if os.environ.get("FLASHDREAMS_GOLDENS_DIR") else 0
    assert [row["case"] for row in golden] == ["wan-golden"] * goldens
    words = [words[0], "wan21-i2v-tiny-random", "--repeats", "1", "--steps", "1"]
    with pytest.raises(ValueError, match="makes one chunk"):
        script("precision").main([*words, "--variants", "fp8", "--json", str(path), *COMMIT])
    kept = [row["steps"] for row in read_report(path)["rows"]]
    assert kept == [1, 1], "of the case before it"


def test_peers(script, tmp_path):
    path = tmp_path / "peers.json"
    words = ["--preset", "tiny", "--repeats", "1", "--json", str(path)]
    script("peers").main([*words, *COMMIT])
    ours, theirs, *stream = read_report(path)["rows"]
    assert ours["max_difference"] < 1e-4 and theirs["gflop"] > 0
    assert stream[1]["gflop"] > 2 * stream[0]["gflop"], "recomputing costs more"


def test_attention(script, tmp_path):
    path = tmp_path / "attention.json"
    script("attention").main(["--preset", "tiny", "--repeats", "1", "--json", str(path), *COMMIT])
    assert {"sdpa", "sdpa_math"} <= {row["variant"] for row in read_report(path)["rows"]}


def decode(script, path: Path, *words: str) -> list[dict]:
    sizes = ["--dim", "8", "--taehv-width", "8", "--latent-height", "4", "--latent-width", "4"]
    script("decode").main([*sizes, "--repeats", "2", *words, "--json", str(path), *COMMIT])
    return read_report(path)["rows"]


def test_decode(script, tmp_path):
    path = tmp_path / "decode.json"
    rows = decode(script, path)
    assert [row["case"].split(",")[0] for row in rows] == ["Wan autoencoder"] * 2 + ["TAEHV"] * 2
    for framewise, at_once in (rows[:2], rows[2:]):
        assert framewise["ratio"] == 1 and framewise["max_difference"] == 0
        assert at_once["max_difference"] < 1e-5 < at_once["difference_bound"], "float32"
        assert at_once["fps"] == pytest.approx(12e3 / at_once["p50_ms"])
        assert at_once["state_bytes"] == framewise["state_bytes"] > 0
        assert at_once["conv_ratio"] == at_once["p50_ms"] / at_once["conv_ms"]


def test_a_decoder_that_fails_or_differs_leaves_the_rows_of_the_others(
    script, tmp_path, monkeypatch
):
    decoders, take = script("decode"), VideoDecoder.take_forms

    def take_forms(decoder, forms):
        take(decoder, forms)
        if forms.head_channels == 1:
            decoder.decode = lambda *_: 1 / 0
        if forms.head_channels == 16:
            decode = decoder.decode
            decoder.decode = lambda *given: decode(*given) * torch.nan

    monkeypatch.setattr(VideoDecoder, "take_forms", take_forms)
    names = "fast; fast, 3 channels out; fast, 16 channels out"
    rows = decode(script, tmp_path / "decode.json", "--variants", names)
    reasons = json.loads((tmp_path / "decode.json").read_text())["not_measured"]
    cases = {row["case"] for row in rows}
    assert {row["variant"] for row in rows} == {decoders.FRAMEWISE, decoders.AT_ONCE, "fast"}
    for case in cases:
        assert reasons[f"{case}, fast, 3 channels out"] == "division by zero"
        assert "frames differ by nan" in reasons[f"{case}, fast, 16 channels out"]


def test_decode_times_every_variant_and_the_convolutions_alone(script, tmp_path):
    path = tmp_path / "decode.json"
    rows = decode(script, path, "--variants", "all", "--repeats", "1")
    variants = script("decode").VARIANTS
    for case, alone in (
        ("Wan", ("fast, graph", "fast, stacked memory")),
        ("TAEHV", ("fast, pairs of frames",)),
    ):
        found = [row["variant"] for row in rows if row["case"].startswith(case)]
        assert found == [name for name in variants if name not in alone]
    assert all(0 < row["max_difference"] < 1e-5 for row in rows if row["variant"] != variants[0])
    found = json.loads(path.read_text())["convolutions"]
    for case, parts in found.items():
        conv_ms = {row["conv_ms"] for row in rows if row["case"] == case}
        assert conv_ms == {sum(part["calls"] * part["best_ms"] for part in parts)}
        assert sum(part["calls"] for part in parts) == (39 if case.startswith("Wan") else 35)
    with pytest.raises(ValueError, match="no variant 'quick'; there are: one frame at a time; "):
        decode(script, path, "--variants", "quick")


def test_decode_refuses_decoders_of_other_weights(script, tmp_path, monkeypatch):
    def other_weights(decoder):
        copied = copy.deepcopy(decoder)
        next(copied.parameters()).data.add_(torch.rand(()))
        return copied

    monkeypatch.setattr(script("decode"), "deepcopy", other_weights)
    with pytest.raises(RuntimeError, match="chunk at once: the outputs differ"):
        decode(script, tmp_path / "decode.json")
    assert not (tmp_path / "decode.json").exists()


def test_peers_refuses_another_model(script, monkeypatch):
    peers = script("peers")
    configs = peers.configs

    def other_eps(sizes, folder, dtype):
        clip, stream = configs(sizes, folder, dtype)
        return peers.derive_config(clip, eps=0.1), stream

    monkeypatch.setattr(peers, "configs", other_eps)
    with pytest.raises(RuntimeError, match="bidirectional step: the outputs differ"):
        peers.main(["--preset", "tiny", "--repeats", "1", *COMMIT])


def test_ratios_are_of_pairs(script):
    ratio_fields = script("report").ratio_fields
    assert ratio_fields([2, 4, 9], [1, 2, 3]) == {"ratio": 2, "ratio_quartiles": [2, 3]}
    with pytest.raises(ValueError, match="zip"):
        ratio_fields([2, 4], [1])


def test_a_report_that_leaves_something_out_is_refused(script):
    report = script("report")
    row = dict(
        case="c", variant="v", repeats=1, p50_ms=1.0, p95_ms=1.0, p99_ms=1.0, output_sha256="0"
    )
    cpu = torch.device("cpu")
    made = report.new_report("b", cpu, {"a": 1}, [row], "0" * 40)
    assert made["config_sha256"] != report.config_sha256({"a": 2})
    with pytest.raises(ValueError, match=r"lacks rows\[0\].fps"):
        report.new_report("b", cpu, {"a": 1}, [row], "0" * 40, ("fps",))
    for name in ("config_sha256", "device", "rows"):
        with pytest.raises(ValueError, match=name):
            report.check_report({k: v for k, v in made.items() if k != name})


def test_committed_results_are_whole(script):
    files = sorted((FOLDER / "results").rglob("*.json"))
    assert files
    for file in files:
        script("report").check_report(json.loads(file.read_text()))
