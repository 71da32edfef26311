"""Logs that are replayed from the command line: as they were, and changed by further flags."""

import json

import pytest

from flashdreams.run import main
from tests.harness import run_engine

SLUG = "self-forcing-tiny-random"
STEPS = 4


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert main([SLUG, "--total-blocks", f"{STEPS}", "--output-dir", str(folder)]) == 0
    return folder / f"log_{SLUG}.jsonl"


def replay(log, capsys, *words):
    """Exit code, what was printed last, stats."""
    capsys.readouterr()
    code = main(["--replay", str(log), *words])
    out = capsys.readouterr()
    folder = log.parent / "replay"
    return code, out.out + out.err, json.loads((folder / f"stats_{SLUG}.json").read_text())


def changed(log, path, **fingerprint):
    """The log of a run with another fingerprint."""
    first, *others = log.read_text().splitlines()
    header = json.loads(first)
    header["fingerprint"] |= fingerprint
    header["config"] = header["config"].replace(str(log.parent), str(path.parent))
    path.write_text("\n".join([json.dumps(header), *others]) + "\n")
    return path


def test_a_replay_reaches_the_hashes(logged, capsys):
    code, text, _ = replay(logged, capsys)
    assert code == 0 and f"{STEPS} of {STEPS} AR steps have the hashes of the log." in text


def test_another_decoder_leaves_the_latents(logged, capsys):
    words = ("--pipeline.decoder.dim", "8", "--hash-frames", "True")
    code, text, other = replay(logged, capsys, *words)
    assert code == 0 and f"{STEPS} of {STEPS} AR steps have the hashes of the log." in text
    _, _, same = replay(logged, capsys, "--hash-frames", "True")
    frames = [[record["frames_sha256"] for record in found["records"]] for found in (other, same)]
    assert all(a != b for a, b in zip(*frames, strict=True))  # it was another decoder


def test_another_size_is_made_and_said(logged, capsys):
    code, text, found = replay(logged, capsys, "--height", "48", "--width", "64")
    assert code == 0 and len(found["records"]) == STEPS
    assert f"0 of {STEPS} AR steps" in text and "whose latents have another size" in text
    assert "latent_height: 4 there, 6 here" in text


def test_a_replay_uses_the_attention_backend_of_the_log(logged, capsys, tmp_path):
    log = changed(logged, tmp_path / logged.name, attention_backend="sdpa_math")
    code, text, found = replay(log, capsys)
    assert found["header"]["fingerprint"]["attention_backend"] == "sdpa_math"
    assert "numerics:" not in text
    # Method and numerics are said to be equal, and the log was made by another backend.
    assert code == 1 and "the hashes had to be equal" in text


def test_a_replay_names_what_it_cannot_use_and_the_largest_difference(logged, capsys, tmp_path):
    log = changed(logged, tmp_path / logged.name, attention_backend="sdpa_cudnn")
    code, text, _ = replay(log, capsys)
    assert code == 0
    assert "numerics: attention_backend sdpa_cudnn is not used: needs a CUDA device" in text
    code, text, _ = replay(logged, capsys, "--pipeline.diffusion-model.transformer.eps", "1e-3")
    assert code == 0 and "largest difference of sampled latent values is" in text


def test_choices_of_another_run_can_be_named(logged, capsys, tmp_path):
    log = changed(logged, tmp_path / logged.name, attention_backend="sdpa_math")
    words = [SLUG, "--total-blocks", "1", "--output-dir", str(tmp_path / "out")]
    assert main([*words, "--numerics-from", str(log)]) == 0
    stats = json.loads((tmp_path / "out" / f"stats_{SLUG}.json").read_text())
    assert stats["header"]["attention_backend"] == "sdpa_math"
    assert main([*words, "--numerics-from", str(tmp_path / "absent")]) == 2
    assert "--numerics-from" in capsys.readouterr().err


@pytest.mark.slow
def test_a_strict_log_of_one_rank_is_reached_by_two(tmp_path):
    words = [SLUG, "--total-blocks", f"{STEPS}", "--output-dir", str(tmp_path)]
    assert main([*words, "--parallel.strict", "True"]) == 0
    run_engine(2, ["--replay", str(tmp_path / f"log_{SLUG}.jsonl")], tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert f"{STEPS} of {STEPS} AR steps have the hashes of the log." in said
    assert "ulysses 2" in said  # they shared the work
